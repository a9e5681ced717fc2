"""Laws of mixers: of the block that their options describe, for itself. A network adds nothing between tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from medmamba.layers import Place
from medmamba.mixers import get_core
from medmamba.mixers.block import BlockOptions, MixerBlock, mixer_builder

from .law import Law, require

Block = Mapping[str, Any]

WIDTH = 12
#: Where all axes are alike, where slices are thick, in an image, and at the coarsest stage of a volume.
PLACES = {
    "volume": Place((3, 3, 3), (2, 2, 2), (4, 4, 4)),
    "thick slices": Place((1, 3, 3), (1, 2, 2), (1, 4, 4), depth=1),
    "image": Place((3, 3), (2, 2), (4, 4)),
    "coarsest": Place((3, 3, 3), (1, 1, 1), (16, 16, 16), depth=2, is_deepest=True),
}
#: Odd, of one voxel per axis, and larger than in the others.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "volume": [(5, 7, 6), (1, 5, 4), (4, 1, 1)],
    "thick slices": [(3, 6, 5), (1, 4, 7)],
    "image": [(7, 6), (1, 5)],
    "coarsest": [(3, 2, 3), (1, 1, 1)],
}
CONTROLS = ("identity", "dwconv")


def build(block: Block, place: str = "volume", ssm_mode: str = "scan") -> MixerBlock:
    """A block of the options at a place of :data:`PLACES`, in float64, with the same weights at every call.

    Norms and biases are drawn as well: ones and zeros would hide what they do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = mixer_builder(block, get_core, ssm_mode)(WIDTH, place=PLACES[place])
        assert isinstance(made, MixerBlock)
        for parameter in made.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.2)
    return made.double()


def feature(shape: tuple[int, ...], batch: int = 2, seed: int = 1) -> Tensor:
    """(batch, *shape, WIDTH) of white noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, WIDTH, generator=generator, dtype=torch.float64)


def masked(made: MixerBlock, x: Tensor, mask: Tensor) -> Tensor:
    """The block as masked pretraining runs it: every part gets the mask of its tokens."""
    depth, height, width = (1,) * (5 - x.dim()) + tuple(x.shape[1:-1])
    u = x.flatten(1, -2)
    for part in made.parts:
        u = part(u, (depth, height, width), mask=mask.flatten(1))
    return u.view(x.shape)


def any_shape_comes_back(block: Block, place: str) -> None:
    made = build(block, place)
    for shape in SHAPES[place]:
        x = feature(shape)
        y = made(x)
        require(y.shape == x.shape, f"{tuple(x.shape)} came back as {tuple(y.shape)}")
        require(y.dtype == x.dtype, f"{x.dtype} came back as {y.dtype}")
        require(bool(y.isfinite().all()), f"not finite for {tuple(x.shape)}")


def every_parameter_gets_a_gradient(block: Block, place: str) -> None:
    made = build(block, place)
    total = torch.stack([(made(feature(shape)) * feature(shape, seed=2)).sum() for shape in SHAPES[place]]).sum()
    total.backward()
    gradients = {name: p.grad for name, p in made.named_parameters()}
    without = [name for name, g in gradients.items() if g is None or not g.isfinite().all()]
    require(not without, f"no finite gradient: {', '.join(without)}")
    zero = [name for name, g in gradients.items() if g is not None and not g.any()]
    require(not zero, f"a gradient of zeros: {', '.join(zero)}")


def the_same_input_gives_the_same_bits(block: Block, place: str) -> None:
    made = build(block, place).eval()
    x = feature(SHAPES[place][0])
    require(torch.equal(made(x), made(x)), "two runs differ")


def samples_do_not_see_each_other(block: Block, place: str) -> None:
    made = build(block, place).eval()
    x = feature(SHAPES[place][0])
    _require_close(made(x[:1]), made(x)[:1], "a sample alone and beside another one")


def a_padded_voxel_influences_no_other(block: Block, place: str) -> None:
    made = build(block, place).eval()
    shape = SHAPES[place][0]
    x = feature(shape)
    mask = torch.zeros(2, *shape, dtype=torch.bool)
    mask[0, : shape[0] - 1, 1:, : shape[2] - 2] = True  # padding at three sides
    mask[1] = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4  # and anywhere
    padded = torch.where(mask.unsqueeze(-1), x, float("nan"))
    zeros = torch.where(mask.unsqueeze(-1), x, 0.0).requires_grad_()
    y = masked(made, zeros, mask)
    require(torch.equal(masked(made, padded, mask)[mask], y[mask]), "what stands in masked voxels changes others")
    y[mask].square().sum().backward()
    assert zeros.grad is not None
    require(not zeros.grad[~mask].any(), "a gradient reaches masked voxels")


def a_mask_that_keeps_all_changes_nothing(block: Block, place: str) -> None:
    made = build(block, place).eval()
    x = feature(SHAPES[place][0])
    kept = masked(made, x, torch.ones(x.shape[:-1], dtype=torch.bool))
    _require_close(kept, made(x), "with a mask that keeps all, and without one")


def the_size_does_not_grow_with_the_patch(block: Block, place: str) -> None:
    made = build(block, place).eval()
    with torch.no_grad():
        small, large = (float(made(feature((n, n, n), batch=1)).square().mean().sqrt()) for n in (4, 16))
    require(0.5 < large / small < 2, f"rms {small:.2g} for 4 x 4 x 4 voxels, {large:.2g} for 16 x 16 x 16")


def half_precision_stays_finite_and_near(block: Block, place: str) -> None:
    made = build(block, place).float().eval()
    x = 30 * feature(SHAPES[place][0]).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    require(bool(y.isfinite().all()), "not finite in bfloat16")
    exact = made(x)
    error = float(((y.float() - exact).norm() / exact.norm()).detach())
    require(error < 0.1, f"bfloat16 differs from float32 by {error:.2g} of its norm")


def one_graph_is_traced_with_its_gradient(block: Block, place: str) -> None:
    made = build(block, place).float()
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = feature((4, 6, 6)).float()
    y = compiled(x)
    _require_close(y, made(x), "compiled and not", rtol=1e-4, atol=1e-5)
    y.sum().backward()
    without = [name for name, p in made.named_parameters() if p.grad is None]
    require(not without, f"no gradient when compiled: {', '.join(without)}")


def it_is_made_of_json(block: Block, place: str) -> None:
    written = json.loads(json.dumps(dict(block)))
    require(written == dict(block), f"JSON makes {written} of {dict(block)}")
    options = BlockOptions.from_mapping(written)
    require(options == BlockOptions.from_mapping(block), "options differ after JSON")
    again = BlockOptions.from_mapping(json.loads(json.dumps(asdict(options))))
    made = mixer_builder(asdict(again), get_core)(WIDTH, place=PLACES[place])
    made.double().load_state_dict(build(block, place).state_dict())


def a_control_stands_in_the_place_of_its_core(block: Block, control: str) -> None:
    made = build(block, ssm_mode=control)
    core = BlockOptions.from_mapping(block).at(PLACES["volume"]).core
    if core is not None and get_core(core) is not get_core(control):
        kinds = {type(module) for module in made.modules()}
        require(get_core(core) not in kinds, f"the core {core} is still there")
        require(get_core(control) in kinds, f"there is no {control}")
    made(feature(SHAPES["volume"][0])).sum().backward()


def _require_close(found: Tensor, expected: Tensor, which: str, *, rtol: float = 1e-7, atol: float = 1e-7) -> None:
    """LawBroken unless two results agree; by default within torch's tolerance for float64."""
    require(found.shape == expected.shape, f"{which}: {tuple(found.shape)} and {tuple(expected.shape)}")
    error = float((found - expected).detach().abs().max())
    require(bool(torch.isclose(found, expected, rtol=rtol, atol=atol).all()), f"{which}: they differ by {error:.2g}")


_EVERYWHERE = tuple(PLACES)
_VOLUME = ("volume",)

LAWS = (
    Law(
        "shapes",
        "any patch comes back in its shape",
        "let no parameter depend on the grid; allow odd axes and axes of one voxel",
        any_shape_comes_back,
        _EVERYWHERE,
    ),
    Law(
        "gradients",
        "every parameter gets a gradient",
        "leave out what nothing uses, or what the convolutions of this place make useless",
        every_parameter_gets_a_gradient,
        _EVERYWHERE,
    ),
    Law(
        "repeatable",
        "the same input gives the same bits",
        "draw no random numbers and keep no state between two calls",
        the_same_input_gives_the_same_bits,
        _EVERYWHERE,
    ),
    Law(
        "samples",
        "samples do not see each other",
        "take means and sums over tokens (axis 1), never over samples (axis 0)",
        samples_do_not_see_each_other,
        _EVERYWHERE,
    ),
    Law(
        "padding",
        "a padded voxel influences no other",
        "begin and end with medmamba.mixers.mask.keep(u, mask), and count only tokens that take part",
        a_padded_voxel_influences_no_other,
        ("volume", "thick slices"),
    ),
    Law(
        "full mask",
        "a mask that keeps all changes nothing",
        "compute the same with a mask as without one",
        a_mask_that_keeps_all_changes_nothing,
        _VOLUME,
    ),
    Law(
        "patch size",
        "the size of the result does not grow with the patch",
        "divide sums over tokens by their number, or by the sum of their weights",
        the_size_does_not_grow_with_the_patch,
        _VOLUME,
    ),
    Law(
        "half precision",
        "bfloat16 stays finite and near float32",
        "compute sums of tokens in float32 (medmamba.mixers.precision)",
        half_precision_stays_finite_and_near,
        _VOLUME,
    ),
    Law(
        "compile",
        "torch.compile traces one graph with its gradient",
        "let no branch depend on the values of a tensor: no .item(), no `if tensor`",
        one_graph_is_traced_with_its_gradient,
        _VOLUME,
    ),
    Law(
        "JSON",
        "its options survive a plans file",
        "use JSON values in `block`: lists for tuples, names for classes",
        it_is_made_of_json,
        _VOLUME,
    ),
    Law(
        "controls",
        "a control stands in the place of its core",
        "name the core in `block`, and leave everything else to the options of a block",
        a_control_stands_in_the_place_of_its_core,
        CONTROLS,
    ),
)
