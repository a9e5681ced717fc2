"""The size of what scans read: its quantile, and its limit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.mixers import ScanCore, clip_scan_inputs, counted_scan_inputs, scan_names
from medmamba.mixers.scan_input import MagnitudeCounts
from medmamba.networks import create_network

SMALL = {"base_features": 8, "depths": 1, "decoder_depths": 1, "d_state": 2}
STRIDES = [[1, 1, 1], *[[2, 2, 2]] * 3]


def network(mode: str = "scan") -> torch.nn.Module:
    torch.manual_seed(0)
    return create_network("vmunet", 1, 2, strides=STRIDES, ssm_mode=mode, **SMALL).eval()


def image() -> torch.Tensor:
    return torch.randn(1, 1, 8, 16, 8, generator=torch.Generator().manual_seed(0))


def inputs_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What every scan reads of :func:`image`, after what limits it."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0]}))
        for name in scan_names(net)
    ]
    with torch.no_grad():
        net(image())
    for handle in handles:
        handle.remove()
    return found


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    share=st.floats(1e-3, 1),
    cut=st.integers(0, 60),
)
def test_a_quantile_is_the_least_value_with_that_share_below_it_to_a_thousandth(values, share, cut):
    counts = MagnitudeCounts()
    for part in (values[:cut], values[cut:]):
        counts.add(torch.tensor(part, dtype=torch.float32))
    exact = sorted(map(abs, values))[math.ceil(share * len(values)) - 1]
    tiny = torch.finfo(torch.float32).tiny
    assert counts.total == len(values)
    assert exact <= counts.quantile(share) <= exact * 1.001 + tiny


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_quantile_is_refused(bad):
    counts = MagnitudeCounts()
    with pytest.raises(ValueError, match="of 0 values"):
        counts.quantile(0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        counts.add(torch.tensor([1.0, bad]))
    counts.add(torch.ones(3))
    with pytest.raises(ValueError, match="above 0, at most 1"):
        counts.quantile(0.0)


def test_every_scan_is_counted_and_the_network_left_as_it_was():
    net = network()
    expected = inputs_of(net)
    assert len(expected) == sum(isinstance(module, ScanCore) for module in net.modules()) > 1
    with torch.no_grad(), counted_scan_inputs(net) as counts:
        net(image())
        net(image())
    for name, read in expected.items():
        assert counts[name].total == 2 * read.numel()
        assert read.abs().max() <= counts[name].quantile(1.0) <= 1.001 * read.abs().max()
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_clipped_scan_reads_nothing_beyond_its_limit_and_below_it_the_same():
    net = network()
    free = inputs_of(net)
    first, *rest = scan_names(net)
    limits = {first: float(free[first].abs().median()), **dict.fromkeys(rest, 1e6)}
    clip_scan_inputs(net, limits)
    read = inputs_of(net)[first]
    assert torch.equal(read, free[first].clamp(-limits[first], limits[first]))
    assert (read != free[first]).float().mean() == pytest.approx(0.5, abs=0.01)


def test_limits_that_nothing_exceeds_change_no_bit_and_no_weight():
    net, clipped = network(), network()
    clip_scan_inputs(clipped, {name: float(x.abs().max()) for name, x in inputs_of(net).items()})
    assert clipped.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(clipped(image()), net(image()))


def test_limits_go_with_a_copy_of_the_network():
    net = network()
    with torch.no_grad():
        free = net(image())
        clip_scan_inputs(net, dict.fromkeys(scan_names(net), 1e-3))
        clipped = net(image())
        assert not torch.equal(clipped, free)
        assert torch.equal(copy.deepcopy(net)(image()), clipped)
        core = net.get_submodule(scan_names(net)[0])
        tokens = torch.randn(1, 6, core.D.shape[-1])
        assert torch.equal(pickle.loads(pickle.dumps(core))(tokens, (1, 2, 3)), core(tokens, (1, 2, 3)))


def test_limits_of_other_scans_and_impossible_ones_are_refused():
    names = scan_names(network())
    for limits in ({}, dict.fromkeys(names[1:], 1.0), {**dict.fromkeys(names, 1.0), "stem": 1.0}):
        with pytest.raises(ValueError, match="the scans are"):
            clip_scan_inputs(network(), limits)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a number above 0"):
            clip_scan_inputs(network(), dict.fromkeys(names, bad))
    assert scan_names(network("identity")) == []
