"""The Triton backend: values in Triton's interpreter, machine code without a GPU, everything where there is a GPU.

The interpreter runs the kernels on CPU tensors, about a millisecond per operation, so its problems are tiny and the
chunks are shortened until they have several. It must be switched on before triton is imported: a child process runs
all cases once and reports. It computes exp2, log and divisions as numpy does, so it says nothing about a GPU's
approximations. Its product of bfloat16 tiles multiplies their bit patterns, so the child process brings a right one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medmamba_kernels import selective_scan
from medmamba_kernels.backends import _launch, _ssd, gpu
from medmamba_kernels.inputs import ScanInputs
from medmamba_kernels.testing import TOLERANCES, assert_close, make_problem

HERE = Path(__file__).parent
ROUTES = ["dhw", "hwd:reverse"]
RESETS = ["dwh:reset=line", "hwd:snake:reset=plane:reverse"]

# Keyword arguments of make_problem; in capitals, constants of the backend; "without" lists absent inputs. The chunks
# have 8 tokens.
CASES = {
    "one voxel": {"grid": (1, 1, 1), "channels": 3, "state_size": 1, "routes": ROUTES},
    "odd": {"grid": (1, 3, 5), "channels": 5, "state_size": 3, "routes": ROUTES},
    "odd, float64": {"grid": (1, 3, 5), "channels": 5, "state_size": 3, "routes": ROUTES, "dtype": "float64"},
    "rounded to bfloat16": {"grid": (1, 3, 4), "channels": 4, "routes": ["dhw"], "dtype": "bfloat16"},
    "kept apart": {"grid": (1, 3, 3), "batch": 2, "channels": 2, "routes": ROUTES, "merge": "none"},
    "a launch per route": {"grid": (1, 2, 5), "channels": 3, "routes": ROUTES, "merge": "mean", "COPIES_BYTES": 0},
    "apart, a launch per route": {
        "grid": (1, 2, 5),
        "channels": 3,
        "merge": "none",
        "routes": ROUTES,
        "COPIES_BYTES": 0,
    },
    "resets": {"grid": (2, 2, 5), "channels": 3, "state_size": 2, "routes": RESETS},
    "masked": {"grid": (1, 3, 4), "batch": 2, "channels": 3, "state_size": 2, "routes": ["dhw"], "mask_fraction": 0.5},
    "masked, resets, apart": {
        "grid": (2, 2, 3),
        "channels": 2,
        "state_size": 2,
        "routes": RESETS,
        "mask_fraction": 0.5,
        "merge": "none",
    },
    "blocks one after the other": {"grid": (1, 2, 5), "channels": 36, "routes": ["dwh"], "PROGRAMS": 1},
    "blocks side by side": {"grid": (1, 2, 5), "channels": 36, "routes": ["dwh"], "PROGRAMS": 8},
    "nothing optional": {"grid": (1, 2, 5), "channels": 3, "routes": ["dwh"], "without": ["D", "dt_bias", "softplus"]},
    "final state": {"grid": (1, 3, 5), "channels": 3, "state_size": 2, "routes": ROUTES, "with_state": True},
    "final state of one chunk": {"grid": (1, 2, 3), "channels": 3, "routes": ["dwh"], "with_state": True},
    "final state, resets": {"grid": (2, 2, 5), "channels": 2, "state_size": 2, "routes": RESETS, "with_state": True},
    "more states than a launch takes": {
        "grid": (1, 2, 5),
        "channels": 3,
        "state_size": 5,
        "routes": ["dwh"],
        "with_state": True,
        "MAX_STATE_SIZE": 2,
    },
    "heads": {"grid": (1, 3, 5), "channels": 6, "state_size": 3, "routes": ROUTES, "heads": 2},
    "heads, one chunk": {"grid": (1, 2, 3), "channels": 4, "routes": ["dhw"], "heads": 2, "with_state": True},
    "heads, every second state saved": {"grid": (1, 3, 5), "channels": 6, "routes": ROUTES, "heads": 2, "CHUNK": 4},
    "heads, resets, masked, apart": {
        "grid": (2, 2, 3),
        "batch": 2,
        "channels": 4,
        "state_size": 3,
        "routes": RESETS,
        "heads": 2,
        "mask_fraction": 0.4,
        "merge": "none",
        "with_state": True,
    },
    "heads, a launch per route": {"grid": (1, 2, 5), "channels": 4, "routes": ROUTES, "heads": 2, "COPIES_BYTES": 0},
    "heads in groups": {"grid": (1, 2, 5), "channels": 6, "routes": ["dwh"], "heads": 3, "PROGRAMS": 4},
    "heads of several tiles": {"grid": (1, 2, 5), "channels": 20, "state_size": 18, "routes": ["dwh"], "heads": 1},
    "heads, low rank, masked": {
        "grid": (1, 2, 5),
        "channels": 4,
        "routes": ["dwh"],
        "heads": 2,
        "dt_rank": 3,
        "mask_fraction": 0.4,
    },
    "heads, nothing optional": {
        "grid": (1, 2, 5),
        "channels": 4,
        "routes": ["dwh"],
        "heads": 2,
        "without": ["D", "dt_bias", "softplus"],
    },
    "heads, steps of all sizes": {"grid": (1, 3, 7), "channels": 4, "routes": ["dwh"], "heads": 2, "dt_scale": 30.0},
    "heads, in bfloat16": {
        "grid": (1, 3, 5),
        "channels": 6,
        "routes": ["dwh"],
        "heads": 2,
        "with_state": True,
        "dtype": "bfloat16",
    },
    "heads, float64": {
        "grid": (1, 2, 5),
        "channels": 4,
        "state_size": 3,
        "routes": ["dwh"],
        "heads": 2,
        "dtype": "float64",
        "MAX_STATE_SIZE": 2,
    },
    "low rank": {"grid": (1, 2, 5), "channels": 5, "routes": ["dwh"], "dt_rank": 2, "mask_fraction": 0.4},
    "very small steps": {"grid": (1, 2, 5), "channels": 3, "routes": ["dwh"], "without": ["dt_bias"], "dt_offset": -9},
    "very large steps": {"grid": (1, 2, 5), "channels": 3, "routes": ["dwh"], "without": ["dt_bias"], "dt_offset": 100},
}

CHILD = """
import json, math, sys
from dataclasses import replace
import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from medmamba_kernels.backends import _launch, _ssd, gpu
from medmamba_kernels.testing import check_against_reference, make_problem

gpu.unavailable_reason = lambda device: None
_launch.chunk_size = lambda length: 8
multiply = InterpreterBuilder.create_dot

def in_float32(tile):
    if tile.dtype.scalar != tl.bfloat16:
        return tile
    return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, in_float32(a), in_float32(b), *rest)
real_empty = torch.empty
torch.empty = lambda *a, **kw: real_empty(*a, **kw).fill_(math.nan)  # outputs must be written

def run(case):
    _launch.PROGRAMS, _launch.COPIES_BYTES = case.pop("PROGRAMS", 2), case.pop("COPIES_BYTES", 2**20)
    _ssd.CHUNK, gpu.MAX_STATE_SIZE = case.pop("CHUNK", 8), case.pop("MAX_STATE_SIZE", 128)
    dtype, without = getattr(torch, case.pop("dtype", "float32")), case.pop("without", [])
    offset = case.pop("dt_offset", 0)
    p = make_problem(**case)
    p = replace(p, dt=p.dt + offset, x=p.x.mT.contiguous().mT, B=torch.cat([p.B, p.C], -1)[..., :p.B.shape[-1]])
    if "softplus" in without:
        p = replace(p, dt=p.dt.abs(), dt_softplus=False)
    p = replace(p, **{name: None for name in without if name != "softplus"})
    check_against_reference(p, "triton", dtype)
    if p.dt_mask is None:
        return
    poisoned = {name: getattr(p, name).clone() for name in ("x", "dt", "B", "C")}
    for tensor in poisoned.values():
        tensor[~p.dt_mask] = math.nan
    cotangents = {"y": torch.ones(()).double(), "state": torch.ones(()).double()}
    clean = p.to(dtype).run_with_gradients("triton", cotangents)
    got = replace(p, **poisoned).to(dtype).run_with_gradients("triton", cotangents)
    for name, value in clean.items():
        assert torch.equal(got[name], value), f"{name} depends on what masked tokens hold"

results = {}
for name, case in json.load(sys.stdin).items():
    try:
        run(case)
        results[name] = ""
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


def _needs_triton() -> None:
    reason = gpu._missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def interpreted():
    """What went wrong in every case, "" for nothing."""
    _needs_triton()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD]
    child = subprocess.run(
        command, env=environment, input=json.dumps(CASES), text=True, capture_output=True, timeout=600, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_definition_in_the_interpreter(interpreted, name):
    assert interpreted[name] == ""


def test_the_package_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from medmamba_kernels import BACKENDS, choose_backend
from medmamba_kernels.testing import self_test
print(BACKENDS["triton"].unavailable_reason(torch.device("cuda", 0)))
print(choose_backend("auto", torch.device("cuda", 0)), self_test("torch").passed)
"""
    child = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    reason, choice = child.stdout.splitlines()
    assert "install" in reason
    assert choice == "torch True"


def test_cpu_tensors_are_refused_in_words():
    assert "tensors are on cpu" in gpu.unavailable_reason(torch.device("cpu"))


class _NoKernels:
    """In the place of a module of kernels: remembers the grids of the launches."""

    def __init__(self):
        self.grids = []

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda **arguments: None


@pytest.mark.parametrize("heads", [None, 1], ids=["S6", "SSD"])
def test_many_short_sequences_stay_within_the_axes_of_a_grid(monkeypatch, heads):
    kernels = _NoKernels()
    monkeypatch.setattr(gpu, "_kernels", lambda: kernels)
    monkeypatch.setattr(_ssd, "_kernels", lambda: kernels)
    p = make_problem((1, 1, 2), batch=70000, channels=1, state_size=1, routes="raster2", heads=heads)
    order = torch.stack([route.order(p.grid) for route in p.routes]).int()
    inputs = ScanInputs(*p.to(torch.float32).leaves.values(), None, None, order, None, final_state=True)
    y, states, final = gpu.forward(inputs, save_states=True)
    gpu.backward(inputs, y, final, states)
    assert len(kernels.grids) >= 4
    assert all(grid[0] < 2**31 and max(grid[1:], default=0) < 2**16 for grid in kernels.grids)


@pytest.mark.parametrize("grid", [(2**31,), (1, 2**16), (1, 1, 2**16)], ids=str)
def test_a_launch_that_no_gpu_takes_is_refused_in_words(grid):
    with pytest.raises(ValueError, match="fewer samples or routes"):
        _launch.checked_launch(*grid)


# Machine code, compiled ahead of time: no driver is needed.

REGISTERS = {
    "_scan_chunk_kernel": 128,
    "_scan_carry_kernel": 128,
    "_scan_fwd_kernel": 128,
    "_scan_bwd_kernel": 255,
    "_ssd_steps_kernel": 128,
    "_ssd_chunk_kernel": 255,
    "_ssd_carry_kernel": 128,
    "_ssd_output_kernel": 255,
    "_ssd_bwd_states_kernel": 255,
    "_ssd_bwd_pairs_kernel": 255,
}
S6_KERNELS = [name for name in REGISTERS if name.startswith("_scan")]
SSD_KERNELS = [name for name in REGISTERS if name.startswith("_ssd")]
# Without a product of matrices.
SCALAR_KERNELS = ("_ssd_steps_kernel", "_ssd_carry_kernel")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
S6_INPUTS = ("p_x", "p_dt", "p_b", "p_c", "p_in", "p_weight", "p_ddt", "p_dy")
SSD_INPUTS = ("p_x", "p_raw", "p_b", "p_c", "p_in", "p_weight", "p_in_weight", "p_out_weight", "p_ddt", "p_dy")
# Shared memory of a multiprocessor of gfx942, the smallest of all.
SHARED_MEMORY = 65536
BYTES = {"p_mask": "*u8", "p_starts": "*i8", "p_resets": "*i8"}


def _constants(name, target, dtype, state_size, width):
    """Compile-time arguments and options of a kernel, as a launch would choose them."""
    shared = {"SOFTPLUS": True, "BM": 16, "BE": 32}
    if name.startswith("_scan"):
        is_nvidia_backward = name == "_scan_bwd_kernel" and target.startswith("sm")
        tile = gpu.tile_sizes(state_size, is_backward=name == "_scan_bwd_kernel")
        return {**shared, **tile}, {**gpu.LAUNCH, "maxnreg": 255} if is_nvidia_backward else gpu.LAUNCH
    tile = _ssd.tile_sizes(state_size, width, dtype == "bf16")
    products = _ssd.product_options(target.startswith("gfx"))
    shared |= {"Q": _ssd.CHUNK, "BH": 16, "PRECISION": products.pop("PRECISION")}
    options = {"_ssd_steps_kernel": _ssd.LAUNCH_STEPS, "_ssd_carry_kernel": _ssd.LAUNCH_CARRY}
    return {**shared, **tile}, options.get(name, products)


def _compile(name, target, dtype, state_size, is_full, flag=True, width=64):
    """Compile as a launch with 16-byte aligned tensors and channels in multiples of 16 would.

    Args:
        dtype: "fp32" or "bf16", of the inputs.
        is_full: with mask and resets.
        flag: REVERSE and ACCUMULATE.
        width: channels of a head.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_s6 = name.startswith("_scan")
    kernel = getattr((gpu if is_s6 else _ssd)._kernels(), name)
    constants, options = _constants(name, target, dtype, state_size, width)
    constants |= {"REVERSE": flag, "ACCUMULATE": flag}
    inputs = S6_INPUTS if is_s6 else SSD_INPUTS
    signature, values, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        aligned = name.startswith(("p_", "s_")) or name == "channels"
        if name in constants or (name in BYTES and not is_full):
            signature[name], values[(i,)], aligned = "constexpr", constants.get(name), False
        elif name.startswith("p_"):
            signature[name] = BYTES.get(name, f"*{dtype}" if name in inputs else "*fp32")
        else:
            signature[name] = "i32"
        if name == "p_order":
            signature[name] = "*i32"
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _usage(compiled, target, folder) -> tuple[int, int]:
    """Registers of a thread, and spilled bytes or registers."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        # Scalar registers may move to lanes of vector registers, which costs no memory.
        counts = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["private_segment_fixed_size"]
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        pytest.skip(f"this triton brings no cuobjdump in {tools}")
    run = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], text=True, capture_output=True, check=True)
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _check_machine_code(folder, name, target, dtype, state_size, is_full, flag=True, width=64):
    _needs_triton()
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 keeps triton from compiling")
    compiled = _compile(name, target, dtype, state_size, is_full, flag, width)
    registers, spilled = _usage(compiled, target, folder)
    assert spilled == 0
    assert registers <= REGISTERS[name]
    assert compiled.metadata.shared <= SHARED_MEMORY
    offsets = re.findall(r"tt\.addptr .* : .*, (?:tensor<[0-9x]*x)?(i\d+)>?", compiled.asm["ttir"])
    assert len(offsets) == compiled.asm["ttir"].count("tt.addptr ")
    assert set(offsets) == {"i64"}
    if target == "sm_90" and name == "_scan_fwd_kernel" and state_size == 16:
        # All states of a channel live in one thread: nothing is exchanged.
        assert "shfl" not in compiled.asm["ptx"]
        assert "bar.sync" not in compiled.asm["ptx"]
    if name in SSD_KERNELS and name not in SCALAR_KERNELS:
        _check_tensor_cores(compiled, target, dtype)


def _check_tensor_cores(compiled, target, dtype):
    if target.startswith("gfx"):
        assert re.search(r"v_mfma_f32_\w*" + ("bf16" if dtype == "bf16" else "f32"), compiled.asm["amdgcn"])
        return
    kind = r"bf16\.bf16" if dtype == "bf16" else r"tf32\.tf32"
    assert re.search(rf"(wgmma\.mma_async|mma\.sync)\S*{kind}", compiled.asm["ptx"])
    assert "cvt.rna.tf32" in compiled.asm["ptx"] or dtype == "bf16"


@pytest.mark.parametrize("name", REGISTERS)
def test_machine_code_has_no_spills_and_64_bit_offsets(tmp_path, name):
    _check_machine_code(tmp_path, name, "sm_90", "bf16", 16, True)


@pytest.mark.aot
@pytest.mark.parametrize("flag", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("is_full", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("state_size", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", S6_KERNELS)
def test_all_machine_code_has_no_spills_and_64_bit_offsets(tmp_path, name, target, dtype, state_size, is_full, flag):
    _check_machine_code(tmp_path, name, target, dtype, state_size, is_full, flag)


@pytest.mark.aot
@pytest.mark.parametrize("is_full", [False, True], ids=["plain, first", "masked, later"])
@pytest.mark.parametrize(("state_size", "width"), [(16, 64), (128, 64), (4, 24), (64, 256)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SSD_KERNELS)
def test_all_machine_code_of_heads_has_no_spills_and_64_bit_offsets(
    tmp_path, name, target, dtype, state_size, width, is_full
):
    _check_machine_code(tmp_path, name, target, dtype, state_size, is_full, is_full, width)


# On a GPU.


def _load_test_scan():
    spec = importlib.util.spec_from_file_location("_test_scan_problems", HERE / "test_scan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCAN = _load_test_scan()


@pytest.fixture
def cuda():
    device = torch.device("cuda")
    reason = "torch sees no GPU" if not torch.cuda.is_available() else gpu.unavailable_reason(device)
    if reason is not None:
        if os.environ.get("MEDMAMBA_REQUIRE_GPU") == "1":
            pytest.fail(f"MEDMAMBA_REQUIRE_GPU=1 and {reason}", pytrace=False)
        pytest.skip(reason)
    return device


def _cotangents(problem, backend):
    return {name: torch.randn_like(result) for name, result in problem.results(backend).items()}


def _check_on_gpu(problem, dtype, device):
    """As ``check_against_reference``, with the reference on the CPU."""
    rounded = problem.to(dtype)
    exact = rounded.to(torch.float64)
    cotangents = {name: t.to(dtype).double() for name, t in _cotangents(exact, "reference").items()}
    expected = exact.run_with_gradients("reference", cotangents)
    on_device = {name: t.to(device) for name, t in cotangents.items()}
    got = rounded.to(device=device).run_with_gradients("triton", on_device)
    limits = TOLERANCES[dtype]
    for name, value in expected.items():
        assert_close(name, got[name].cpu(), value, limits.get(name, limits["other"]))


def _check_against_torch_on_gpu(problem):
    """In float32 against the torch backend in float64, for problems that are too large for the reference."""
    exact = problem.to(torch.float32).to(torch.float64)
    cotangents = _cotangents(exact, "torch")
    expected = exact.run_with_gradients("torch", cotangents)
    first, second = (exact.to(torch.float32).run_with_gradients("triton", cotangents) for _ in range(2))
    limits = TOLERANCES[torch.float32]
    for name, value in expected.items():
        assert_close(name, first[name], value, limits.get(name, limits["other"]))
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SCAN.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", SCAN.PROBLEMS)
def test_values_and_gradients_equal_the_definition_on_a_gpu(cuda, name, dtype):
    _check_on_gpu(make_problem(**SCAN.PROBLEMS[name]), dtype, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("state_size", [1, 4, 8, 16, 64, 100])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 1000])
def test_lengths_and_state_sizes_on_a_gpu(cuda, length, state_size):
    problem = make_problem((1, 1, length), channels=33, state_size=state_size, routes="raster2")
    _check_on_gpu(problem, torch.float32, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("dt", [0.0, 1e-6, 1.0, 30.0, 100.0])
@pytest.mark.parametrize("rate", [1e-4, 1e3])
def test_extreme_steps_and_decays_on_a_gpu(cuda, dt, rate):
    p = make_problem((2, 3, 5), channels=3, state_size=2, routes="raster2")
    p = replace(p, dt=torch.full_like(p.dt, dt), A=torch.full_like(p.A, -rate), dt_softplus=False, dt_bias=None)
    _check_on_gpu(p, torch.float32, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [None, 3], ids=["S6", "SSD"])
@pytest.mark.parametrize("copies", [0, 2**30], ids=["a launch per route", "one launch"])
@pytest.mark.parametrize("programs", [16, 1024])
def test_a_larger_volume_equals_the_torch_backend_and_repeats_on_a_gpu(monkeypatch, cuda, copies, programs, heads):
    monkeypatch.setattr(_launch, "COPIES_BYTES", copies)
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    p = make_problem((15, 16, 17), batch=2, channels=72, state_size=16, mask_fraction=0.2, heads=heads, with_state=True)
    _check_against_torch_on_gpu(p.to(device=cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [None, 2], ids=["S6", "SSD"])
def test_a_long_slow_scan_stays_exact_on_a_gpu(cuda, heads):
    """Decays of 1e-5 per step: the state is a sum over most of the 65536 tokens; one more makes the chunks longer."""
    for width in (65536, 65537):
        p = make_problem((1, 1, width), channels=32, state_size=2, routes="raster2", heads=heads)
        p = replace(p, dt=torch.full_like(p.dt, 1e-2), A=torch.full_like(p.A, -1e-3), dt_softplus=False, dt_bias=None)
        _check_against_torch_on_gpu(p.to(device=cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [None, 1], ids=["S6", "SSD"])
def test_more_sequences_than_an_axis_of_a_grid_on_a_gpu(cuda, heads):
    p = make_problem((1, 1, 3), batch=40000, channels=1, state_size=1, routes="raster2", heads=heads)
    _check_against_torch_on_gpu(p.to(device=cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "heads", "state_size"), [(64, 1, 16), (128, 4, 64), (40, 5, 130), (512, 2, 8)])
def test_heads_of_all_widths_on_a_gpu(cuda, channels, heads, state_size, dtype):
    problem = make_problem(
        (3, 5, 11), channels=channels, state_size=state_size, heads=heads, routes="line6", mask_fraction=0.3
    )
    _check_on_gpu(problem, dtype, cuda)


@pytest.mark.gpu
def test_more_states_than_a_launch_takes_on_a_gpu(cuda):
    _check_on_gpu(make_problem((2, 3, 5), channels=3, state_size=130, with_state=True), torch.float32, cuda)


@pytest.mark.gpu
def test_gradients_pass_gradcheck_on_a_gpu(cuda):
    p = make_problem((2, 2, 3), channels=2, state_size=3, routes=["dhw", "hwd:reverse:reset=line"]).to(device=cuda)
    tensors = [t.requires_grad_() for t in (p.x, p.dt, p.A, p.B, p.C, p.D, p.dt_bias)]

    def run(x, dt, A, B, C, D, dt_bias):
        return selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias, routes=p.routes, grid=p.grid, backend="triton")

    assert torch.autograd.gradcheck(run, tensors)
