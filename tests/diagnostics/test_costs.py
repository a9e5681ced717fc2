"""Memory and work of a network, counted without data."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from medmamba.diagnostics import Footprint, MemoryModel, footprint, operations
from medmamba.diagnostics.footprint import segmentation_loss
from medmamba.mixers import CONTROLS, CORES, RoutedScan, placed_scans
from medmamba.networks import NETWORKS, create_network
from medmamba_kernels import selective_scan
from medmamba_kernels.backends import assume_backend, choose_backend

STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
SMALL = {"base_features": 8, "depths": 1, "decoder_depths": 1}
MIB = 2**20


def on_meta(name="vmunet", strides=STRIDES, **options) -> nn.Module:
    with torch.device("meta"):
        return create_network(name, 1, 3, strides=strides, **options)


def really_kept(network: nn.Module, image: torch.Tensor) -> int:
    """Bytes that autograd keeps of a real forward pass in float32, the image included."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {image.untyped_storage().data_ptr(): image.untyped_storage()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = segmentation_loss(network.train()(image))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_counted_is_what_autograd_keeps(name):
    network = create_network(name, 1, 3, strides=STRIDES, **SMALL)
    counted = footprint(network, 1, (16, 24, 16), device="cpu")
    assert counted.kept == really_kept(network, torch.randn(1, 1, 16, 24, 16))
    assert counted.parameters == sum(p.numel() for p in network.parameters())
    assert counted.kept < counted.peak < 3 * counted.kept


@pytest.mark.parametrize("mode", sorted(set(CORES) - {"scan", *CONTROLS}))
def test_a_network_with_another_core_is_counted_without_data(mode):
    network = create_network("vmunet", 1, 3, strides=STRIDES, **SMALL, d_state=2, ssm_mode=mode)
    counted = footprint(network, 1, (16, 24, 16), device="cpu")
    assert counted.kept == really_kept(network, torch.randn(1, 1, 16, 24, 16))
    macs = operations(network, 1, (16, 24, 16))
    is_scan = issubclass(CORES[mode], RoutedScan)
    assert (macs.scans > 0) == is_scan == (counted.kept_by_scans > 0) == bool(placed_scans(network, 1, (16, 24, 16)))


def test_counting_needs_no_memory_and_leaves_the_network_as_it_was():
    network = on_meta().eval()
    counted = footprint(network, 1, (128, 128, 128))
    assert counted.kept > 100 * MIB
    assert not network.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


def test_a_gpu_keeps_half_precision_and_norms_in_float32():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv3d(1, 8, 1), nn.LayerNorm(8), nn.Conv3d(8, 2, 1)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).movedim(1, -1)).movedim(-1, 1).contiguous())

    voxels = 16**3
    full, half = (footprint(Norm(), 1, (16, 16, 16), device=device).kept / voxels for device in ("cpu", "cuda"))
    assert full == pytest.approx(
        _loss_bytes(2) + 4 + 32 + 8 + 32, rel=0.01
    )  # image, norm (input, mean and deviation), head
    # The image and its cast, the norm as before, the head in bfloat16.
    assert half == pytest.approx(_loss_bytes(2) + 4 + 2 + 32 + 8 + 16, rel=0.01)


def _loss_bytes(classes: int) -> int:
    """Two softmaxes in float32, which class in int64 and as bool."""
    return 8 * classes + 8 + classes


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_the_casts_are_those_of_cudas_autocast():
    """torch's own autocast of CUDA, on tensors without data, which a build with CUDA can do without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    network = on_meta(**SMALL)
    kept = {}
    was = torch.get_autocast_dtype("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), assume_backend("triton"):
        weights = {
            name: torch.empty(p.shape, device="cuda", requires_grad=True) for name, p in network.named_parameters()
        }
        own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        image = torch.empty(1, 1, 32, 32, 32, device="cuda")

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        keep(image)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                segmentation_loss(functional_call(network.train(), weights, (image,)))
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", was)
        expected = sum(storage.nbytes() for storage in kept.values())
        # Of the weights of convolutions and linear layers, in bfloat16: once and not per sample.
        casts = sum(2 * p.numel() for name, p in network.named_parameters() if p.dim() > 1 and "A_log" not in name)
    # CUDA also keeps the logits in half precision.
    heads = sum(2 * 3 * n**3 for n in (32, 16, 8))
    assert footprint(network, 1, (32, 32, 32)).kept == pytest.approx(expected - heads - casts, rel=0.01)


def test_what_is_kept_grows_with_the_voxels():
    network = on_meta(**SMALL)
    one, eight = (footprint(network, 1, (n, n, n)).kept for n in (32, 64))
    assert eight == pytest.approx(8 * one, rel=0.02)


def test_blocks_that_are_recomputed_are_kept_as_their_inputs_only():
    options = {"base_features": 8, "depths": 2, "expansion": 4}
    usual, recomputed = (
        footprint(on_meta("mednext", **options, checkpoint_style=style), 1, (32, 32, 32))
        for style in (None, "outside_block")
    )
    assert recomputed.kept < usual.kept / 2
    assert recomputed.kept < recomputed.peak < usual.peak


def test_controls_keep_nothing_in_scans():
    assert footprint(on_meta(**SMALL), 1, (32, 32, 32)).kept_by_scans > 0
    assert footprint(on_meta(**SMALL, ssm_mode="identity"), 1, (32, 32, 32)).kept_by_scans == 0


def test_patches_that_the_network_refuses_are_refused():
    network = on_meta(**SMALL)
    with pytest.raises(ValueError, match="not divisible"):
        footprint(network, 1, (30, 32, 32))
    with pytest.raises(ValueError, match="unknown device 'tpu'; known: cpu, cuda"):
        footprint(network, 1, (32, 32, 32), device="tpu")


def test_an_assumed_backend_need_not_run_here():
    cuda = torch.device("cuda")
    with assume_backend("triton"):
        assert choose_backend("auto", cuda) == "triton"
        assert choose_backend("torch", cuda) == "torch"
    with assume_backend(None):
        assert choose_backend("auto", torch.device("cpu")) in ("native", "torch")
    with pytest.raises(ValueError, match="unknown scan backend 'fast'"), assume_backend("fast"):
        pass


def test_macs_of_a_convolution_and_a_scan():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 5, 3, padding=1)

        def forward(self, x):
            x = self.conv(x).flatten(2).mT
            weights = x.new_ones(2, 5, 7), x.new_ones(2, 5, 3)
            b, length, _ = x.shape
            rank, B = x.new_ones(b, length, 2, 3), x.new_ones(b, length, 2, 7)
            return selective_scan(
                x, rank, -weights[0], B, B, routes=["dhw", "hwd"], grid=(4, 5, 6), dt_weight=weights[1]
            )

    tokens = 4 * 5 * 6
    macs = operations(Both(), 2, (4, 5, 6))
    assert macs.total == tokens * (2 * 5 * 27 + 2 * 5 * (4.5 * 7 + 3))
    assert macs.scans == 0  # no module of ours around it


def test_macs_of_a_network_and_the_share_of_its_scans():
    one, eight = (operations(on_meta(**SMALL), 1, (n, n, n)) for n in (32, 64))
    assert eight.total == pytest.approx(8 * one.total)
    assert eight.scans == pytest.approx(8 * one.scans)
    assert 0 < one.scans < one.total
    assert operations(on_meta(**SMALL, ssm_mode="identity"), 1, (32, 32, 32)).scans == 0


def test_the_largest_batch_fits_and_one_more_does_not():
    model = MemoryModel(fixed=100, bytes_per_parameter=10, factor=2, is_calibrated=True, source="")
    counted = Footprint(kept=40, peak=50, parameters=5)
    assert model.peak(counted, 3) == 100 + 50 + 300
    for budget in (149, 249, 250, 349, 350, 10_000):
        batch = model.largest_batch(counted, budget)
        assert batch == 0 or model.peak(counted, batch) <= budget
        assert model.peak(counted, batch + 1) > budget


def test_every_device_has_coefficients_that_say_where_they_come_from():
    for device in ("cpu", "cuda"):
        model = MemoryModel.load(device)
        assert model.source
        assert model.factor > 0
        assert math.isfinite(model.fixed + model.bytes_per_parameter)
    with pytest.raises(KeyError, match=r"no memory model for 'tpu'; known: .*cuda"):
        MemoryModel.load("tpu")


def test_diagnostics_import_with_torch_only():
    code = "import sys, medmamba.diagnostics; print([m for m in ('nnunetv2', 'scipy') if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == "[]", child.stderr
