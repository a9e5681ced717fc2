"""The Triton backend: values in Triton's interpreter, machine code without a GPU, everything where there is a GPU.

The interpreter runs the kernels on CPU tensors, about a millisecond per operation, so its problems are tiny and the
chunks are shortened until they have several. It must be switched on before triton is imported: a child process runs
all cases once and reports. It computes exp2, log and divisions as numpy does, so it says nothing about a GPU's
approximations.
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
from medmamba_kernels.backends import gpu
from medmamba_kernels.testing import TOLERANCES, assert_close, make_problem

HERE = Path(__file__).parent
ROUTES = ["dhw", "hwd:reverse"]
RESETS = ["dwh:reset=line", "hwd:snake:reset=plane:reverse"]

# Keyword arguments of make_problem; in capitals, constants of the backend; "without" lists absent inputs.
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
    "masked": {"grid": (2, 3, 3), "batch": 2, "channels": 3, "state_size": 3, "routes": ["dhw"], "mask_fraction": 0.5},
    "masked, resets, apart": {
        "grid": (2, 2, 4),
        "channels": 3,
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
    "heads": {"grid": (1, 3, 5), "channels": 6, "state_size": 3, "routes": ROUTES, "heads": 2},
    "low rank": {"grid": (1, 2, 5), "channels": 5, "routes": ["dwh"], "dt_rank": 2, "mask_fraction": 0.4},
    "very small steps": {"grid": (1, 2, 5), "channels": 3, "routes": ["dwh"], "without": ["dt_bias"], "dt_offset": -9},
    "very large steps": {"grid": (1, 2, 5), "channels": 3, "routes": ["dwh"], "without": ["dt_bias"], "dt_offset": 100},
}

CHILD = """
import json, math, sys
from dataclasses import replace
import torch
from medmamba_kernels.backends import gpu
from medmamba_kernels.testing import check_against_reference, make_problem

gpu.unavailable_reason = lambda device: None
gpu._chunk_size = lambda length: 8
real_empty = torch.empty
torch.empty = lambda *a, **kw: real_empty(*a, **kw).fill_(math.nan)  # outputs must be written

def run(case):
    gpu.PROGRAMS, gpu.COPIES_BYTES = case.pop("PROGRAMS", 2), case.pop("COPIES_BYTES", 2**20)
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
    cotangent = {"y": torch.ones(()).double()}
    clean = p.to(dtype).run_with_gradients("triton", cotangent)
    got = replace(p, **poisoned).to(dtype).run_with_gradients("triton", cotangent)
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


# Machine code, compiled ahead of time: no driver is needed.

REGISTERS = {"_scan_chunk_kernel": 128, "_scan_carry_kernel": 128, "_scan_fwd_kernel": 128, "_scan_bwd_kernel": 255}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
INPUTS = ("p_x", "p_dt", "p_b", "p_c", "p_in", "p_weight", "p_ddt", "p_dy")
BYTES = {"p_mask": "*u8", "p_starts": "*i8", "p_resets": "*i8"}


def _compile(kernel, target, dtype, state_size, is_full, flag=True):
    """Compile as a launch with 16-byte aligned tensors and channels in multiples of 16 would.

    Args:
        dtype: "fp32" or "bf16", of the inputs.
        is_full: with mask and resets.
        flag: REVERSE and ACCUMULATE.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        **gpu.tile_sizes(state_size, is_backward=kernel.__name__ == "_scan_bwd_kernel"),
        "SOFTPLUS": True,
        "REVERSE": flag,
        "ACCUMULATE": flag,
        "BM": 16,
        "BE": 32,
    }
    signature, values, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        aligned = name.startswith(("p_", "s_")) or name == "channels"
        if name in constants or (name in BYTES and not is_full):
            signature[name], values[(i,)], aligned = "constexpr", constants.get(name), False
        elif name.startswith("p_"):
            signature[name] = BYTES.get(name, f"*{dtype}" if name in INPUTS else "*fp32")
        else:
            signature[name] = "i32"
        if name == "p_order":
            signature[name] = "*i32"
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    is_nvidia_backward = kernel.__name__ == "_scan_bwd_kernel" and target.startswith("sm")
    options = {**gpu.LAUNCH, "maxnreg": 255} if is_nvidia_backward else gpu.LAUNCH
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


def _check_machine_code(folder, name, target, dtype, state_size, is_full, flag=True):
    _needs_triton()
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 keeps triton from compiling")
    compiled = _compile(getattr(gpu._kernels(), name), target, dtype, state_size, is_full, flag)
    registers, spilled = _usage(compiled, target, folder)
    assert spilled == 0
    assert registers <= REGISTERS[name]
    offsets = re.findall(r"tt\.addptr .* : .*, (?:tensor<[0-9x]*x)?(i\d+)>?", compiled.asm["ttir"])
    assert len(offsets) == compiled.asm["ttir"].count("tt.addptr ")
    assert set(offsets) == {"i64"}
    if target == "sm_90" and name == "_scan_fwd_kernel" and state_size == 16:
        # All states of a channel live in one thread: nothing is exchanged.
        assert "shfl" not in compiled.asm["ptx"]
        assert "bar.sync" not in compiled.asm["ptx"]


@pytest.mark.parametrize("name", REGISTERS)
def test_machine_code_has_no_spills_and_64_bit_offsets(tmp_path, name):
    _check_machine_code(tmp_path, name, "sm_90", "bf16", 16, True)


@pytest.mark.aot
@pytest.mark.parametrize("flag", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("is_full", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("state_size", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REGISTERS)
def test_all_machine_code_has_no_spills_and_64_bit_offsets(tmp_path, name, target, dtype, state_size, is_full, flag):
    _check_machine_code(tmp_path, name, target, dtype, state_size, is_full, flag)


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


def _move(problem, device):
    tensors = {name: value for name, value in vars(problem).items() if isinstance(value, torch.Tensor)}
    return replace(problem, **{name: value.to(device) for name, value in tensors.items()})


def _check_on_gpu(problem, dtype, device):
    """As ``check_against_reference``, with the reference on the CPU."""
    rounded = problem.to(dtype)
    exact = rounded.to(torch.float64)
    cotangent = torch.randn_like(exact.run("reference")).to(dtype).double()
    expected = exact.run_with_gradients("reference", cotangent)
    got = _move(rounded, device).run_with_gradients("triton", cotangent.to(device))
    limits = TOLERANCES[dtype]
    for name, value in expected.items():
        assert_close(name, got[name].cpu(), value, limits.get(name, limits["other"]))


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
@pytest.mark.parametrize("copies", [0, 2**30], ids=["a launch per route", "one launch"])
@pytest.mark.parametrize("programs", [16, 1024])
def test_a_larger_volume_equals_the_torch_backend_and_repeats_on_a_gpu(monkeypatch, cuda, copies, programs):
    monkeypatch.setattr(gpu, "COPIES_BYTES", copies)
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    p = _move(make_problem((15, 16, 17), batch=2, channels=72, state_size=16, mask_fraction=0.2), cuda)
    cotangent = torch.randn_like(p.x)
    expected = p.run_with_gradients("torch", cotangent)
    first, second = (p.to(torch.float32).run_with_gradients("triton", cotangent) for _ in range(2))
    for name, value in expected.items():
        assert_close(name, first[name], value, TOLERANCES[torch.float32].get(name, 1e-5))
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
def test_gradients_pass_gradcheck_on_a_gpu(cuda):
    p = _move(make_problem((2, 2, 3), channels=2, state_size=3, routes=["dhw", "hwd:reverse:reset=line"]), cuda)
    tensors = [t.requires_grad_() for t in (p.x, p.dt, p.A, p.B, p.C, p.D, p.dt_bias)]

    def run(x, dt, A, B, C, D, dt_bias):
        return selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias, routes=p.routes, grid=p.grid, backend="triton")

    assert torch.autograd.gradcheck(run, tensors)
