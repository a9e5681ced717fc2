"""Selective scan on the CPU through the compiled library ``_native`` (sources in ``kernels/csrc``).

The library has a plain C interface and knows neither Python nor torch; it is found next to the package
``medmamba_kernels`` and loaded with ctypes, which releases the interpreter lock during a call. It picks AVX-512, AVX2
or the baseline instruction set when it is first used.

Environment:
    MEDMAMBA_NATIVE_LIBRARY: path of the library to load instead of the installed one (development, sanitizer builds).
    MEDMAMBA_NATIVE_THREADS: "own" for threads of the library's own instead of torch's OpenMP threads.
    MEDMAMBA_NATIVE_ISA: "avx512", "avx2" or "baseline": use exactly this instruction set; read once per process.

Values are computed in float64 when ``x`` is float64 and in float32 otherwise. Results are the same bits for any number
of threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from medmamba_kernels.inputs import ScanInputs, bad_step_error
from medmamba_kernels.lowering import Gradients, fold_projection, project_dt

ABI_VERSION = 3
BLOCK = 64  # tokens between two saved states, kBlock in kernels.h
LIBRARY_NAMES = ("_native.so", "_native.dylib", "_native.pyd", "_native.dll")
BAD_ORDER = 5
OUT_OF_MEMORY = 6
BAD_STEP = 8


class NativeError(RuntimeError):
    """The native library refused a call or cannot be used; the text says why."""


class _Scan(ctypes.Structure):
    """``medmamba_scan`` of ``kernels/csrc/medmamba_native.h``, field by field."""

    _fields_ = (
        ("struct_size", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("routes", ctypes.c_int64),
        ("states", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("softplus", ctypes.c_int32),
        ("merge", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "dt_weight")),
        *((name, ctypes.c_void_p) for name in ("mask", "order", "starts")),
        ("x_stride", ctypes.c_int64 * 2),
        ("dt_stride", ctypes.c_int64 * 3),
        ("B_stride", ctypes.c_int64 * 3),
        ("C_stride", ctypes.c_int64 * 3),
        ("y", ctypes.c_void_p),
        ("final_state", ctypes.c_void_p),
        ("checkpoint", ctypes.c_void_p),
        ("dy", ctypes.c_void_p),
        ("dy_stride", ctypes.c_int64 * 3),
        ("dfinal_state", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "ddt_weight")),
    )


def library_path() -> Path | None:
    """The library that would be loaded, or None when the installation has none."""
    override = os.environ.get("MEDMAMBA_NATIVE_LIBRARY")
    if override:
        return Path(override)
    import medmamba_kernels

    candidates = (Path(folder) / name for folder in medmamba_kernels.__path__ for name in LIBRARY_NAMES)
    return next((path for path in candidates if path.is_file()), None)


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its functions declared, or None and the reason."""
    path = library_path()
    if path is None:
        return None, "medmamba was installed without its compiled library (no C++17 compiler at build time?)"
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library.medmamba_abi_version.restype = ctypes.c_int32
        version = library.medmamba_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return None, f"{path} has interface version {version}, expected {ABI_VERSION}; reinstall medmamba"
    library.medmamba_isa.restype = ctypes.c_char_p
    library.medmamba_status_text.restype = ctypes.c_char_p
    library.medmamba_status_text.argtypes = [ctypes.c_int32]
    library.medmamba_scan_checkpoint_size.restype = ctypes.c_int64
    for function in ("medmamba_scan_checkpoint_size", "medmamba_scan_forward", "medmamba_scan_backward"):
        getattr(library, function).argtypes = [ctypes.POINTER(_Scan)]
    if library.medmamba_isa() is None:
        wanted = os.environ.get("MEDMAMBA_NATIVE_ISA")
        return None, f"MEDMAMBA_NATIVE_ISA={wanted} names an instruction set this CPU or build does not have"
    if os.environ.get("MEDMAMBA_NATIVE_THREADS") != "own":
        _share_openmp(library)
    return library, ""


def _share_openmp(library: ctypes.CDLL) -> bool:
    """Let the library work on torch's OpenMP threads; False (threads of its own) when torch's runtime is not found.

    Those workers spin after every parallel region of torch, and would keep other threads off the cores.
    """
    runtime = _loaded_openmp()
    if runtime is None:
        return False
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    library.medmamba_use_openmp(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names))
    return True


def _loaded_openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that torch has loaded: the one in its wheel, else the system's; None for any other."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for path in (*map(str, bundled), "libgomp.so.1"):
        try:
            return ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue
    return None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise NativeError(f"the native back end cannot run: {reason}")
    return library


def unavailable_reason(device: torch.device) -> str | None:
    """None when the back end works on ``device``, otherwise the reason in one line."""
    if device.type != "cpu":
        return f"the native back end computes on the CPU, the tensors are on {device}"
    library, reason = _load()
    return None if library is not None else reason


def states_shape(
    batch: int, length: int, routes: int, channels: int, state_size: int, device_type: str
) -> tuple[int, ...]:
    """Shape of the saved states: the state at the start of every block of 64 tokens, channels padded to 16.

    The library decides how the values lie inside.
    """
    return (batch, routes, -(-length // BLOCK), state_size, -(-channels // 16) * 16)


def isa() -> str:
    """Instruction set in use: "avx512", "avx2" or "baseline" (SSE2 or NEON)."""
    return _library().medmamba_isa().decode()


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the compute dtype and with a contiguous last axis; the other axes keep their strides (no copy)."""
    tensor = tensor.to(dtype)
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}, the native back end needs CPU tensors")


def _check_table(name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


class _Call:
    """Arguments of one library call: checks, conversions, and the references that keep the arrays alive."""

    def __init__(self, inputs: ScanInputs) -> None:
        x, dt, A, B, C = inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C
        D, dt_bias, dt_weight, dt_mask = inputs.D, inputs.dt_bias, inputs.dt_weight, inputs.dt_mask
        order, starts = inputs.order, inputs.starts
        if x.dim() != 3 or dt.dim() != 4 or A.dim() not in (2, 3) or B.dim() != 4:
            raise ValueError(
                f"x, dt, A and B have shapes {tuple(x.shape)}, {tuple(dt.shape)}, {tuple(A.shape)} and "
                f"{tuple(B.shape)}; expected (Bt, L, Ch), (Bt, L, K, Ch), (K, Ch, N) or (K, H), and (Bt, L, K, N)"
            )
        if inputs.merge not in ("sum", "none"):
            raise ValueError(f'merge is {inputs.merge!r}, expected "sum" or "none"')
        self.shape = batch, length, channels, routes, states = inputs.sizes
        heads = inputs.heads
        if heads is not None and (heads < 1 or channels % heads):
            raise ValueError(f"A has {heads} heads, which must divide the {channels} channels of x")
        steps = heads or channels
        rank = 0 if dt_weight is None else dt_weight.shape[-1]
        _check_shape("x", x, (batch, length, channels))
        _check_shape("dt", dt, (batch, length, routes, steps if dt_weight is None else rank))
        _check_shape("A", A, (routes, channels, states) if heads is None else (routes, heads))
        _check_shape("B", B, (batch, length, routes, states))
        _check_shape("C", C, (batch, length, routes, states))
        _check_shape("D", D, (routes, channels))
        _check_shape("dt_bias", dt_bias, (routes, steps))
        _check_shape("dt_weight", dt_weight, (routes, steps, rank))
        _check_shape("dt_mask", dt_mask, (batch, length))
        _check_shape("order", order, (routes, length))
        _check_shape("starts", starts, (routes, length))
        _check_table("order", order, torch.int32)
        _check_table("starts", starts, torch.bool)
        if dt_mask is not None and dt_mask.dtype != torch.bool:
            raise TypeError(f"dt_mask has dtype {dt_mask.dtype}, expected torch.bool")

        self.inputs = inputs
        self.dtype = inputs.compute_dtype
        self._alive: list[Tensor] = []
        self.scan = scan = _Scan()
        scan.struct_size = ctypes.sizeof(_Scan)
        scan.batch, scan.length, scan.channels, scan.routes, scan.states = self.shape
        scan.heads, scan.rank = heads or 0, rank
        scan.dtype = int(self.dtype == torch.float64)
        scan.softplus = int(inputs.dt_softplus)
        scan.merge = int(inputs.merge == "none")
        scan.threads = torch.get_num_threads()
        for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C)):
            rows = _rows(tensor, self.dtype)
            self.point(name, rows)
            getattr(scan, f"{name}_stride")[:] = rows.stride()[:-1]
        for name, weights in (("A", A), ("D", D), ("dt_bias", dt_bias), ("dt_weight", dt_weight)):
            self.point(name, None if weights is None else weights.to(self.dtype).contiguous())
        self.point("mask", None if dt_mask is None else dt_mask.contiguous())
        self.point("order", order)
        self.point("starts", starts)

    def point(self, name: str, tensor: Tensor | None) -> None:
        """Set a pointer field; the tensor lives as long as this object."""
        if tensor is not None:
            self._alive.append(tensor)
            setattr(self.scan, name, tensor.data_ptr())

    def empty(self, name: str, *shape: int) -> Tensor:
        """A new output array, not initialised: the library writes every element."""
        tensor = torch.empty(shape, dtype=self.dtype)
        self.point(name, tensor)
        return tensor

    def run(self, function: str) -> None:
        library = _library()
        status = getattr(library, function)(ctypes.byref(self.scan))
        if status == 0:
            return
        message = f"native selective scan, (Bt, L, Ch, K, N) = {self.shape}: "
        message += library.medmamba_status_text(status).decode()
        if status == BAD_STEP:
            projected = project_dt(self.inputs)
            raise bad_step_error(self.inputs, projected.dt, projected.dt_bias)
        if status == BAD_ORDER:
            raise ValueError(message)
        raise MemoryError(message) if status == OUT_OF_MEMORY else NativeError(message)


def _lowered(inputs: ScanInputs) -> ScanInputs:
    """The library projects a low-rank dt in S6; for the few heads of SSD torch does it."""
    return inputs if inputs.heads is None else project_dt(inputs)


def forward(inputs: ScanInputs, *, save_states: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Scan every route and merge.

    Args:
        inputs: the scan; of ``order`` only the range is checked.
        save_states: keep what ``backward`` needs; False (inference) saves K Ch N / 64 values per token.

    Returns:
        y: (Bt, L, Ch) for "sum", (Bt, K, L, Ch) for "none", float32 (float64 if x is).
        states: shape ``states_shape(...)``, private to ``backward``; empty without ``save_states``.
        final: (Bt, K, Ch, N) state after the last step; empty if ``inputs`` does not ask for it.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; an order index is out of range; a step size is
            negative, NaN or infinite.
        NativeError: the library is missing or refuses the call.
    """
    call = _Call(_lowered(inputs))
    batch, length, channels, routes, n_states = call.shape
    y = call.empty("y", *inputs.output_shape())
    final = call.empty("final_state", *inputs.final_shape()) if inputs.final_state else torch.empty(0, dtype=call.dtype)
    states = torch.empty(0, dtype=call.dtype)
    if save_states:
        shape = states_shape(batch, length, routes, channels, n_states, "cpu")
        states = call.empty("checkpoint", *shape)
        # The library pads channels to its own vectors and leaves the rest unwritten.
        written = batch * routes * shape[2] * n_states * _padded_channels(channels, call.dtype)
        states.view(-1)[written:] = 0
    call.run("medmamba_scan_forward")
    return y, states, final


def _padded_channels(channels: int, dtype: torch.dtype) -> int:
    lanes = {"avx512": 64, "avx2": 32, "baseline": 16}[isa()] // dtype.itemsize
    return -(-channels // lanes) * lanes


def backward(inputs: ScanInputs, dy: Tensor, dfinal: Tensor | None, states: Tensor) -> Gradients:
    """Gradients of ``forward`` for the same inputs.

    Args:
        inputs: the scan.
        dy: shape of y, any strides.
        dfinal: gradient of the final state (Bt, K, Ch, N), or None.
        states: from ``forward``.

    Returns:
        Gradients of ``inputs.differentiable`` in their shapes, in the compute dtype; None where the input is None.

    Raises:
        ValueError: as ``forward``; also states that ``forward`` did not make for these sizes.
        NativeError: the library is missing or refuses the call.
    """
    lowered = _lowered(inputs)
    call = _Call(lowered)
    batch, length, channels, routes, n_states = call.shape
    _check_shape("dy", dy, inputs.output_shape())
    shape = states_shape(batch, length, routes, channels, n_states, "cpu")
    if states.dtype != call.dtype or tuple(states.shape) != shape:
        raise ValueError(
            f"states is {tuple(states.shape)} of {states.dtype}, expected {shape} of {call.dtype}; "
            "run forward with save_states=True on the same arguments"
        )
    call.point("checkpoint", states.contiguous())
    dy = _rows(dy, call.dtype)
    call.point("dy", dy)
    call.scan.dy_stride[:] = (dy.stride(0), 0, dy.stride(1)) if inputs.merge == "sum" else dy.stride()[:-1]
    if dfinal is not None:
        _check_shape("dfinal", dfinal, (batch, routes, channels, n_states))
        call.point("dfinal_state", dfinal.to(call.dtype).contiguous())
    gradients = (
        call.empty("dx", batch, length, channels),
        call.empty("ddt", *lowered.dt.shape),
        call.empty("dA", *lowered.A.shape),
        call.empty("dB", batch, length, routes, n_states),
        call.empty("dC", batch, length, routes, n_states),
        None if inputs.D is None else call.empty("dD", routes, channels),
        None if inputs.dt_bias is None else call.empty("ddt_bias", *inputs.dt_bias.shape),
        None if lowered.dt_weight is None else call.empty("ddt_weight", *lowered.dt_weight.shape),
    )
    call.run("medmamba_scan_backward")
    if lowered is inputs:
        return gradients
    dx, ddt, *others = gradients[:-1]
    return dx, *fold_projection(inputs, ddt, others)
