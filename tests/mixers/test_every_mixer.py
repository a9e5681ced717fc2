"""What every mixer must do, run over the registry, for blocks alone; networks with them: tests/networks."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import medmamba.presets
from medmamba.layers import Place
from medmamba.mixers import get_core
from medmamba.mixers.block import BlockOptions, MixerBlock, mixer_builder
from medmamba.presets import MIXERS, MixerSpec, get_mixer

WIDTH = 12
#: Places: where all axes are alike, where slices are thick, in an image, and at the coarsest stage of a volume.
PLACES = {
    "volume": Place((3, 3, 3), (2, 2, 2), (4, 4, 4)),
    "thick slices": Place((1, 3, 3), (1, 2, 2), (1, 4, 4), depth=1),
    "image": Place((3, 3), (2, 2), (4, 4)),
    "coarsest": Place((3, 3, 3), (1, 1, 1), (16, 16, 16), depth=2, is_deepest=True),
}
#: Odd, of one voxel per axis, and larger than in the others.
SHAPES = {
    "volume": [(5, 7, 6), (1, 5, 4), (4, 1, 1)],
    "thick slices": [(3, 6, 5), (1, 4, 7)],
    "image": [(7, 6), (1, 5)],
    "coarsest": [(3, 2, 3), (1, 1, 1)],
}
EVERY_PLACE = [(name, place) for name in MIXERS for place in PLACES]


def block(name: str, place: str = "volume", *, ssm_mode: str = "scan", **changes) -> MixerBlock:
    torch.manual_seed(0)
    build = mixer_builder({**get_mixer(name).block, **changes}, get_core, ssm_mode)
    made = build(WIDTH, place=PLACES[place])
    for parameter in made.parameters():  # ones and zeros of norms and biases would hide what they do
        nn.init.normal_(parameter, std=0.2) if parameter.dim() == 1 else None
    return made.double()


def feature(shape: tuple[int, ...], batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, WIDTH, generator=generator, dtype=torch.float64)


def masked(made: MixerBlock, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The block as masked pretraining runs it: every part gets the mask of its tokens."""
    grid = (1,) * (5 - x.dim()) + tuple(x.shape[1:-1])
    u = x.flatten(1, -2)
    for part in made.parts:
        u = part(u, grid, mask=mask.flatten(1))
    return u.view(x.shape)


@pytest.mark.parametrize(("name", "place"), EVERY_PLACE)
def test_any_shape_comes_back_and_every_parameter_gets_a_gradient(name, place):
    made = block(name, place)
    total = sum((made(feature(shape)) * feature(shape, seed=2)).sum() for shape in SHAPES[place])
    total.backward()
    without = [key for key, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    zero = [key for key, p in made.named_parameters() if not p.grad.any()]
    assert zero == []


@pytest.mark.parametrize(("name", "place"), EVERY_PLACE)
def test_samples_do_not_see_each_other_and_the_same_input_gives_the_same_bits(name, place):
    made = block(name, place).eval()
    x = feature(SHAPES[place][0])
    together = made(x)
    assert torch.equal(together, made(x))
    torch.testing.assert_close(made(x[:1]), together[:1])


@pytest.mark.parametrize("place", ["volume", "thick slices"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_padded_voxel_influences_no_other(name, place):
    made = block(name, place).eval()
    shape = SHAPES[place][0]
    x = feature(shape)
    mask = torch.zeros(2, *shape, dtype=torch.bool)
    mask[0, : shape[0] - 1, 1:, : shape[2] - 2] = True  # padding at three sides
    mask[1] = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4  # and anywhere
    padded = torch.where(mask.unsqueeze(-1), x, float("nan"))
    zeros = torch.where(mask.unsqueeze(-1), x, 0.0).requires_grad_()
    y = masked(made, zeros, mask)
    assert torch.equal(masked(made, padded, mask)[mask], y[mask])
    y[mask].square().sum().backward()
    assert not zeros.grad[~mask].any()


@pytest.mark.parametrize("name", MIXERS)
def test_a_mask_that_keeps_all_changes_nothing(name):
    made = block(name).eval()
    x = feature((5, 7, 6))
    torch.testing.assert_close(masked(made, x, torch.ones(2, 5, 7, 6, dtype=torch.bool)), made(x))


@pytest.mark.parametrize("name", MIXERS)
def test_the_size_of_the_output_does_not_grow_with_the_patch(name):
    made = block(name).eval()
    with torch.no_grad():
        small, large = (made(feature((n, n, n), batch=1)).square().mean().sqrt() for n in (4, 16))
    assert 0.5 < float(large / small) < 2


@pytest.mark.parametrize("name", MIXERS)
def test_half_precision_stays_finite_and_near(name):
    made = block(name).float().eval()
    x = feature((5, 7, 6)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(30 * x)
    assert y.isfinite().all()
    exact = made(30 * x)
    assert (y.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", MIXERS)
def test_one_graph_is_traced_with_its_gradient(name):
    made = block(name).float()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = feature((4, 6, 6)).float()
    y = compiled(x)
    torch.testing.assert_close(y, made(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_it_is_made_of_json(name):
    written = json.loads(json.dumps(dict(MIXERS[name].block)))
    assert written == dict(MIXERS[name].block)
    assert BlockOptions.from_mapping(written) == BlockOptions.from_mapping(MIXERS[name].block)
    again = BlockOptions.from_mapping(json.loads(json.dumps(asdict(BlockOptions.from_mapping(written)))))
    made = mixer_builder(asdict(again), get_core)(WIDTH, place=PLACES["volume"])
    made.double().load_state_dict(block(name).state_dict())


@pytest.mark.parametrize("mode", ["identity", "dwconv"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_control_stands_in_the_place_of_its_core(name, mode):
    made = block(name, ssm_mode=mode)
    if MIXERS[name].block.get("core", "scan") == "scan":
        kinds = {type(module).__name__ for module in made.modules()}
        assert "ScanCore" not in kinds
    made(feature((5, 7, 6))).sum().backward()


@pytest.mark.parametrize("name", MIXERS)
def test_it_says_what_is_theirs_and_what_is_ours(name):
    spec = MIXERS[name]
    assert spec.name == name
    assert spec.title.isalnum()
    assert spec.title.lower() == name
    assert spec.source.link.startswith("https://arxiv.org/abs/")
    for texts in (spec.theirs, spec.changes):
        assert texts
        assert all(text == text.strip() and not text.endswith(".") for text in texts)
    assert len({spec.title for spec in MIXERS.values()}) == len(MIXERS)


def test_a_mixer_is_one_file_and_one_line_of_the_registry():
    files = {path.stem for path in Path(medmamba.presets.__file__).parent.glob("*.py")} - {"__init__", "spec"}
    assert files == set(MIXERS)
    for name in files:
        assert importlib.import_module(f"medmamba.presets.{name}").SPEC is MIXERS[name]


def test_nothing_that_builds_blocks_or_networks_knows_a_mixer_by_name():
    package = Path(medmamba.presets.__file__).parents[1]
    texts = {
        path: path.read_text()
        for folder in ("layers", "mixers", "networks", "nnunet", "inference")
        for path in (package / folder).rglob("*.py")
    }
    known = [(str(path), name) for path, text in texts.items() for name in MIXERS if f'"{name}"' in text]
    assert known == []


def test_an_unknown_mixer_names_the_known_ones():
    with pytest.raises(KeyError, match=r"no mixer 'vim'; known: .*vim3d"):
        get_mixer("vim")


def test_a_mixer_of_a_third_party_is_found_by_its_entry_point(monkeypatch):
    theirs = MixerSpec("theirs3d", "Theirs3D", MIXERS["vim3d"].source, "one line", ("all",), ("nothing",))

    class Point:
        name = "theirs3d"

        def __init__(self, leads_to):
            self.load = lambda: leads_to

    class Points(list):
        names = frozenset({"theirs3d"})

        def select(self, name):
            return [point for point in self if point.name == name]

    monkeypatch.setattr(medmamba.presets, "entry_points", lambda group: Points([Point(theirs)]))
    assert get_mixer("theirs3d") is theirs
    with pytest.raises(KeyError, match="theirs3d"):
        get_mixer("unknown")
    monkeypatch.setattr(medmamba.presets, "entry_points", lambda group: Points([Point("a text")]))
    with pytest.raises(TypeError, match="leads to a str, not to a MixerSpec"):
        get_mixer("theirs3d")
