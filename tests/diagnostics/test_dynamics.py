"""Token dynamics: the reduced eigenvalue problem against the whole one, and what a state dict tells."""

from __future__ import annotations

import pytest
import torch

from medmamba.diagnostics import TokenDynamics, dynamics_eigenvalues, token_dynamics
from medmamba.mixers import get_core
from medmamba.networks import NETWORKS, create_network
from medmamba.training.board import dynamics_scalars

STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]


def projections(states: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, C = torch.randn(2, 3, states, width, generator=generator, dtype=torch.float64)
    return B, C


def whole(B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """All E eigenvalues of the symmetric part, without the reduction."""
    product = C.mT @ B
    return torch.linalg.eigvalsh((product + product.mT) / 2)


@pytest.mark.parametrize(("states", "width"), [(1, 1), (1, 7), (4, 5), (4, 8), (16, 40)])
def test_the_reduced_eigenvalues_are_those_of_the_whole_matrix_and_the_rest_is_zero(states, width):
    B, C = projections(states, width)
    found = dynamics_eigenvalues(B, C)
    assert found.shape == (3, min(2 * states, width))
    padded = torch.cat([found, found.new_zeros(3, width - found.shape[1])], 1).sort(1).values
    torch.testing.assert_close(padded, whole(B, C), rtol=1e-10, atol=1e-10)
    dynamics = TokenDynamics(found, width)
    torch.testing.assert_close(dynamics.smallest, whole(B, C)[:, 0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dynamics.largest, whole(B, C)[:, -1], rtol=1e-10, atol=1e-10)


def test_linearly_dependent_rows_have_eigenvalues_too():
    B, C = projections(3, 10)
    B[:, 1], C[:, 0] = B[:, 0], 2 * B[:, 2]
    found = TokenDynamics(dynamics_eigenvalues(B, C), 10)
    torch.testing.assert_close(found.smallest, whole(B, C)[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.largest, whole(B, C)[:, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sign", "negative"), [(1, 0), (-1, 1)])
def test_equal_projections_only_spread_and_opposite_ones_only_contract(sign, negative):
    B, _ = projections(4, 20)
    found = TokenDynamics(dynamics_eigenvalues(B, sign * B), 20)
    torch.testing.assert_close(
        found.negative, torch.full((3,), float(negative), dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert bool((sign * (found.largest + found.smallest) > 0).all())


def test_as_many_eigenvalues_are_negative_as_positive():
    B, C = projections(4, 20)
    assert (dynamics_eigenvalues(B, 3 * B + 0.1 * C) < 0).sum(1).tolist() == [4, 4, 4]


def test_projections_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="same shape"):
        dynamics_eigenvalues(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["scan", "ssd"])
@pytest.mark.parametrize("parameters", ["route", "direction"])
def test_a_state_dict_tells_which_rows_are_B_and_C(name, parameters):
    core = get_core(name)(12, d_state=4, dt_rank=3, routes="raster4", parameters=parameters)
    sets = len(core.dt_ranges)
    with torch.no_grad():
        core.x_proj.zero_()
        core.x_proj[:, -8:-4, :4] = torch.eye(4)
        core.x_proj[:, -4:, :4] = torch.eye(4) * torch.arange(1, sets + 1).view(-1, 1, 1)
    (found,) = token_dynamics(core.state_dict()).values()
    assert found.width == 12
    torch.testing.assert_close(found.largest, torch.arange(1, sets + 1).double())
    torch.testing.assert_close(found.smallest, torch.zeros(sets).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_with_scans_shows_them_per_stage(name):
    network = create_network(name, 1, 2, strides=STRIDES, base_features=8)
    dynamics = token_dynamics(network.state_dict())
    assert bool(dynamics) == NETWORKS[name].has_scans
    found = dynamics_scalars(dynamics)
    for stage in {tag.split("/")[1] for tag in found}:
        low, high, negative = (found[f"scan/{stage}/eigenvalue_{kind}"] for kind in ("min", "max", "negative"))
        assert low < 0 < high
        assert 0.2 < negative < 0.8


def test_a_control_without_projections_has_none():
    assert token_dynamics(get_core("lti")(8, d_state=2, dt_rank=1, routes="raster2").state_dict()) == {}
