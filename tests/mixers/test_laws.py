"""Every law can be broken: a core that breaks it, alone and as the core of a block, and what the law says of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from medmamba.mixers import CORES
from medmamba.mixers.block import MixerBlock
from medmamba.mixers.laws import CORE_LAWS, MIXER_LAWS, LawBroken, blocks
from medmamba.mixers.mask import keep

OF_CORES = {law.name: law for law in CORE_LAWS}
OF_MIXERS = {law.name: law for law in MIXER_LAWS}


class Sound(nn.Module):
    """Keeps all laws: tokens plus their mean, each times a weight per channel. Others break one thing."""

    def __init__(self, width, *, d_state, dt_rank, routes, kernel_size=(3, 3, 3), dt_range=None, fusion=None):
        super().__init__()
        self.a = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.ones(width))

    def mean(self, u, mask):
        count = u.shape[1] if mask is None else mask.sum(1).clamp_min(1).view(-1, 1, 1)
        return u.float().sum(1, keepdim=True) / count if u.dtype != torch.float64 else u.sum(1, keepdim=True) / count

    def forward(self, u, grid, *, mask=None):
        u = keep(u, mask)
        return keep(self.a * u + self.b * self.mean(u, mask), mask)


class LosesATokenOfAnImage(Sound):
    def forward(self, u, grid, *, mask=None):
        y = super().forward(u, grid, mask=mask)
        return y[:, 1:] if grid[0] == 1 else y


class AnswersInFloat32(Sound):
    def forward(self, u, grid, *, mask=None):
        return super().forward(u, grid, mask=mask).float()


class KnowsThePatch(Sound):
    """A position embedding of the first grid it sees."""

    def forward(self, u, grid, *, mask=None):
        if not hasattr(self, "position"):
            self.register_buffer("position", torch.zeros(1, u.shape[1], u.shape[2], dtype=u.dtype))
        return super().forward(u + self.position, grid, mask=mask)


class CountsItsCalls(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, u, grid, *, mask=None):
        self.calls += 1
        return super().forward(u, grid, mask=mask) + self.calls


class HasAnUnusedParameter(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.c = nn.Parameter(torch.ones(()))


class HasAParameterTimesZero(HasAnUnusedParameter):
    def forward(self, u, grid, *, mask=None):
        return super().forward(u, grid, mask=mask) + 0 * self.c


class DividesByTheNumberOfPairs(HasAnUnusedParameter):
    def forward(self, u, grid, *, mask=None):
        pairs = torch.full((), u.shape[1] - 1, dtype=u.dtype, device=u.device)
        return keep(super().forward(u, grid, mask=mask) + (self.c * u).sum(1, keepdim=True) / pairs * 0.1, mask)


class NeedsThreeAxes(Sound):
    def __init__(self, *args, kernel_size=(3, 3, 3), **kwargs):
        super().__init__(*args, **kwargs)
        if len({3, *kernel_size}) > 1 or len(kernel_size) < 3:
            raise ValueError("only equal kernels")


class Sums(Sound):
    def mean(self, u, mask):
        return u.sum(1, keepdim=True)


class Centres(Sound):
    """Over the samples of a batch, as BatchNorm in training."""

    def forward(self, u, grid, *, mask=None):
        return super().forward(u - keep(u, mask).mean(0, keepdim=True), grid, mask=mask)


class Views(Sound):
    def forward(self, u, grid, *, mask=None):
        return super().forward(u.view(-1, u.shape[-1]).view(u.shape), grid, mask=mask)


class Draws(Sound):
    def forward(self, u, grid, *, mask=None):
        return keep(super().forward(u, grid, mask=mask) + torch.rand_like(u), mask)


class ReadsAll(Sound):
    """A mean over tokens that do not take part as well."""

    def forward(self, u, grid, *, mask=None):
        return keep(super().forward(u, grid), mask)


class LeavesValuesBehindTheMask(Sound):
    def forward(self, u, grid, *, mask=None):
        return super().forward(u, grid, mask=mask) + self.b


class HalvesWithAMask(Sound):
    def forward(self, u, grid, *, mask=None):
        y = super().forward(u, grid, mask=mask)
        return y if mask is None else y / 2


class OverflowsInHalf(Sound):
    factor = 1e6

    def forward(self, u, grid, *, mask=None):
        return super().forward(u, grid, mask=mask) + 0 * (u * self.factor).to(torch.float16).to(u.dtype)


class OverflowsForLargeInput(OverflowsInHalf):
    factor = 1e2


class GrowsInHalf(Sound):
    def forward(self, u, grid, *, mask=None):
        if torch.is_autocast_enabled("cpu"):
            u = 1e4 * u
        return super().forward(u, grid, mask=mask)


class LooksAtValues(Sound):
    def forward(self, u, grid, *, mask=None):
        y = super().forward(u, grid, mask=mask)
        return y if u.sum() > 0 else y * 1.0


class LooksAtAFlag(Sound):
    """Another result when it is compiled."""

    def forward(self, u, grid, *, mask=None):
        y = super().forward(u, grid, mask=mask)
        return 2 * y if torch.compiler.is_compiling() else y


class MakesATensorOnTheCPU(Sound):
    def forward(self, u, grid, *, mask=None):
        return super().forward(u, grid, mask=mask) + torch.ones(u.shape, device="cpu", dtype=u.dtype)


class HasAnOptionWithoutDefault(Sound):
    def __init__(self, *args, kind, **kwargs):
        super().__init__(*args, **kwargs)


class HasAnOptionThatIsATuple(Sound):
    def __init__(self, *args, sizes=(1, 2), **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(sizes, tuple):
            self.c = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("law", CORE_LAWS, ids=str)
def test_a_sound_core_keeps_every_law(law):
    law.check(Sound)


BREAKS_A_CORE = [
    ("any grid", LosesATokenOfAnImage, r"\(2, 15, 12\) on \(1, 5, 3\) came back as \(2, 14, 12\)"),
    ("any grid", AnswersInFloat32, "torch.float64 came back as torch.float32"),
    ("any grid", KnowsThePatch, "RuntimeError: .*size of tensor"),
    ("any grid", CountsItsCalls, "running it changes calls"),
    ("any plan", NeedsThreeAxes, "thick slices: ValueError: only equal kernels"),
    ("gradients", HasAnUnusedParameter, "no finite gradient, or one of zeros: c"),
    ("gradients", HasAParameterTimesZero, "no finite gradient, or one of zeros: c"),
    ("one token", DividesByTheNumberOfPairs, "no finite gradient: .*c"),
    ("magnitude", Sums, "rms of the result on 4, 8 and 16 voxels per axis"),
    ("samples", Centres, "they differ by"),
    ("strides", Views, "RuntimeError: view size is not compatible"),
    ("repeatable", Draws, "two runs differ in the result"),
    ("mask", ReadsAll, "a gradient reaches masked tokens"),
    ("mask", LeavesValuesBehindTheMask, "the result is not 0 where the mask is False"),
    ("full mask", HalvesWithAMask, "they differ by"),
    ("half precision", OverflowsForLargeInput, "bfloat16: not finite for an input of rms 1000"),
    ("half precision", GrowsInHalf, r"bfloat16: differs from float32 by .* \(limit 0.05\)"),
    ("meta device", MakesATensorOnTheCPU, "RuntimeError: .*meta"),
    ("JSON", HasAnOptionWithoutDefault, "options without a default: kind"),
    ("JSON", HasAnOptionThatIsATuple, "other parameters with options from JSON"),
    ("compile", LooksAtValues, "branching"),
    ("compile", LooksAtAFlag, "differ by .* when compiled"),
]


@pytest.mark.parametrize(("name", "core", "seen"), BREAKS_A_CORE)
def test_a_law_of_cores_sees_what_breaks_it(name, core, seen):
    with pytest.raises(LawBroken, match=seen):
        OF_CORES[name].check(core)


def block_of(monkeypatch, core, **options) -> dict:
    monkeypatch.setitem(CORES, "mine", core)
    return {"core": "mine", **options}


@pytest.mark.parametrize("law", MIXER_LAWS, ids=str)
def test_a_sound_mixer_keeps_every_law(law, monkeypatch):
    law.check(block_of(monkeypatch, Sound))


BREAKS_A_MIXER = [
    ("shapes", LosesATokenOfAnImage, "volume: .*Error"),
    ("shapes", KnowsThePatch, "volume: RuntimeError: .*size of tensor"),
    ("gradients", HasAnUnusedParameter, "volume: no finite gradient: .*c"),
    ("gradients", HasAParameterTimesZero, "volume: a gradient of zeros: .*c"),
    ("repeatable", Draws, "volume: two runs differ"),
    ("samples", Centres, "volume: a sample alone and beside another one: they differ by"),
    ("full mask", HalvesWithAMask, "they differ by"),
    ("patch size", Sums, "rms .* for 4 x 4 x 4 voxels"),
    ("half precision", OverflowsInHalf, "not finite in bfloat16"),
    ("half precision", GrowsInHalf, "bfloat16 differs from float32 by"),
    ("compile", LooksAtValues, "branching"),
    ("compile", LooksAtAFlag, "compiled and not: they differ by"),
]


@pytest.mark.parametrize(("name", "core", "seen"), BREAKS_A_MIXER)
def test_a_law_of_mixers_sees_what_breaks_it(name, core, seen, monkeypatch):
    with pytest.raises(LawBroken, match=seen):
        OF_MIXERS[name].check(block_of(monkeypatch, core, norm=False))


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"routes": ("dhw",)}, "JSON makes"),
        ({"core_options": {"kind": {1}}}, "TypeError: .* not JSON serializable"),
        ({"colour": "red"}, "ValueError: a block has no option colour"),
    ],
    ids=str,
)
def test_options_that_json_or_a_block_does_not_know_are_seen(options, seen, monkeypatch):
    with pytest.raises(LawBroken, match=seen):
        OF_MIXERS["JSON"].check(block_of(monkeypatch, Sound, **options))


def test_a_core_that_a_control_does_not_replace_is_seen(monkeypatch):
    block = block_of(monkeypatch, Sound)
    build = blocks.mixer_builder
    monkeypatch.setattr(blocks, "mixer_builder", lambda options, core, ssm_mode: build(options, core))
    with pytest.raises(LawBroken, match="identity: the core mine is still there"):
        OF_MIXERS["controls"].check(block)


def test_a_part_that_forgets_the_mask_is_seen(monkeypatch):
    class Forgetful(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, u, grid, *, mask=None):
            return self.part(u, grid)

    def build(options, core, ssm_mode):
        return lambda width, place: MixerBlock(
            *map(Forgetful, original(options, core, ssm_mode)(width, place=place).parts)
        )

    original = blocks.mixer_builder
    block = block_of(monkeypatch, Sound)
    monkeypatch.setattr(blocks, "mixer_builder", build)
    with pytest.raises(LawBroken, match="volume: what stands in masked voxels changes others"):
        OF_MIXERS["padding"].check(block)


def test_every_law_has_something_that_breaks_it():
    assert {name for name, *_ in BREAKS_A_CORE} == {law.name for law in CORE_LAWS}
    by_themselves = {"padding", "JSON", "controls"}  # in the three tests above
    assert {name for name, *_ in BREAKS_A_MIXER} | by_themselves == {law.name for law in MIXER_LAWS}


def test_a_partial_with_options_is_a_core():
    for law in CORE_LAWS[:2]:
        law.check(partial(CORES["global_conv"], kernel="fout"))


def test_a_law_leaves_the_random_numbers_of_its_caller_alone(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    OF_MIXERS["shapes"].check(block_of(monkeypatch, Sound))
    OF_CORES["any grid"].check(Sound)
    assert torch.equal(torch.rand(3), expected)
