"""The loss of a student against references in float64 that share no code with it, and what plans may say about it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from medmamba.nnunet.distillation import Distillation, DistillationError, DistillationLoss

TEMPERATURE, WEIGHT = 2.5, 0.3
SHAPES = [(1, 1, 1), (5, 7, 9), (1, 6, 4), (4, 3)]
SHA = "0" * 64


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(classes: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(7)).double()


def host_loss(*, has_regions: bool = False, ignore_label: int | None = None) -> torch.nn.Module:
    """As nnU-Net builds it."""
    dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False, "do_bg": has_regions}
    if has_regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore_label is not None)
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


def make_loss(host=None, *, weight=WEIGHT, temperature=TEMPERATURE, has_regions=False, ignore_label=None):
    host = host or host_loss(has_regions=has_regions, ignore_label=ignore_label)
    return DistillationLoss(
        host, weight=weight, temperature=temperature, has_regions=has_regions, ignore_label=ignore_label
    )


def taught(loss, answers, output, target):
    with loss.taught(answers):
        return loss(output, target)


def divergence(loss, answers, output, target) -> float:
    taught(loss, answers, output, target)
    return float(loss.parts["distillation"]) / loss.temperature**2


def softmax(values: np.ndarray) -> np.ndarray:
    """Over axis 1, the slow way."""
    exponentials = np.exp(values)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(axis=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_is_the_formula(shape):
    student, teacher, target = logits(2, 3, *shape), logits(2, 3, *shape, seed=1), labels(3, 2, 1, *shape)
    p, q = softmax(teacher.numpy() / TEMPERATURE), softmax(student.numpy() / TEMPERATURE)
    expected = (1 - WEIGHT) * float(host_loss()(student, target)) + WEIGHT * TEMPERATURE**2 * kl(p, q).mean()
    assert float(taught(make_loss(), [[teacher]], student, target)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_regions_are_bernoulli_variables(shape):
    student, teacher, target = logits(2, 3, *shape), logits(2, 3, *shape, seed=1), labels(2, 2, 3, *shape)
    p, q = (1 / (1 + np.exp(-values.numpy() / TEMPERATURE)) for values in (teacher, student))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    found = divergence(make_loss(has_regions=True), [[teacher]], student, target)
    assert found == pytest.approx(expected, rel=1e-10)


def test_the_gradient_is_temperature_times_the_difference_of_probabilities():
    shape = (3, 4, 5)
    student, teacher = logits(1, 3, *shape).requires_grad_(), logits(1, 3, *shape, seed=1)
    taught(make_loss(weight=1.0), [[teacher]], student, labels(3, 1, 1, *shape)).backward()
    p, q = (softmax(values.detach().numpy() / TEMPERATURE) for values in (teacher, student))
    expected = TEMPERATURE * (q - p) / math.prod(shape)
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-15)


HEADS = [(8, 8, 4), (4, 4, 4), (2, 2, 2)]
DEEP = (0.6, 0.4, 0.0)


def deep(channels: int, seed: int = 0) -> list[torch.Tensor]:
    return [logits(2, channels, *shape, seed=seed + i).float() for i, shape in enumerate(HEADS)]


def deep_host() -> torch.nn.Module:
    return DeepSupervisionWrapper(host_loss(), DEEP)


@pytest.fixture
def heads():
    """Student, teacher and targets at every head."""
    return deep(3), deep(3, 10), [labels(3, 2, 1, *shape).float() for shape in HEADS]


def test_weight_0_gives_the_loss_of_nnunet_bit_for_bit(heads):
    student, teacher, targets = heads
    gradients = []
    for loss in (deep_host(), make_loss(deep_host(), weight=0.0)):
        leaves = [value.clone().requires_grad_() for value in student]
        is_distilled = isinstance(loss, DistillationLoss)
        value = taught(loss, [teacher], leaves, targets) if is_distilled else loss(leaves, targets)
        value.backward()
        gradients.append([value.detach(), *(leaf.grad for leaf in leaves[:2])])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_validation_sees_the_loss_of_nnunet(heads):
    student, teacher, targets = heads
    loss = make_loss(deep_host())
    taught(loss, [teacher], student, targets)
    assert torch.equal(loss(student, targets), deep_host()(student, targets))


def test_every_head_counts_as_nnunet_weights_it(heads):
    student, teacher, targets = heads
    whole = divergence(make_loss(deep_host()), [teacher], student, targets)
    each = [
        divergence(make_loss(), [[there]], here, target)
        for here, there, target in zip(student, teacher, targets, strict=True)
    ]
    assert whole == pytest.approx(sum(w * one for w, one in zip(DEEP, each, strict=True)), rel=1e-6)


@pytest.mark.parametrize("has_regions", [False, True])
def test_a_student_that_equals_its_teacher_has_no_divergence(has_regions):
    student = logits(2, 3, 5, 4, 3).float()
    target = labels(2, 2, 3 if has_regions else 1, 5, 4, 3).float()
    assert divergence(make_loss(has_regions=has_regions), [[student.clone()]], student, target) == 0


def test_several_networks_teach_the_mean_of_their_probabilities():
    shape = (3, 4, 5)
    student, networks = logits(1, 3, *shape), [logits(1, 3, *shape, seed=seed) for seed in (1, 2, 3)]
    p = np.mean([softmax(one.numpy() / TEMPERATURE) for one in networks], axis=0)
    expected = kl(p, softmax(student.numpy() / TEMPERATURE)).mean()
    found = divergence(make_loss(), [[one] for one in networks], student, labels(3, 1, 1, *shape))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("fine", "coarse"), [((4, 6, 2), (2, 3, 1)), ((4, 6, 5), (4, 2, 5)), ((4, 6), (2, 3))], ids=str
)
@pytest.mark.parametrize("has_regions", [False, True])
def test_a_missing_resolution_is_the_mean_probability_of_the_finest(fine, coarse, has_regions):
    student, teacher = logits(1, 3, *coarse), logits(1, 3, *fine, seed=1)
    scaled = teacher.numpy() / TEMPERATURE
    p = 1 / (1 + np.exp(-scaled)) if has_regions else softmax(scaled)
    blocks = [size for large, small in zip(fine, coarse, strict=True) for size in (small, large // small)]
    p = p.reshape(1, 3, *blocks).mean(axis=tuple(range(3, 3 + 2 * len(fine), 2)))
    z = student.numpy() / TEMPERATURE
    if has_regions:
        q = 1 / (1 + np.exp(-z))
        expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    else:
        expected = kl(p, softmax(z)).mean()
    target = labels(2, 1, 3 if has_regions else 1, *coarse)
    found = divergence(make_loss(has_regions=has_regions), [[teacher]], student, target)
    assert found == pytest.approx(expected, rel=1e-10)


def test_a_resolution_that_the_teacher_has_is_its_own():
    target, student = labels(3, 1, 1, 2, 2, 2), logits(1, 3, 2, 2, 2)
    own = logits(1, 3, 2, 2, 2, seed=2)
    answer = [logits(1, 3, 4, 4, 4, seed=1), own]
    assert divergence(make_loss(), [answer], student, target) == divergence(make_loss(), [[own]], student, target)


def test_a_resolution_that_cannot_be_averaged_is_an_error():
    with pytest.raises(ValueError, match=r"\(5, 4, 4\) cannot be averaged to \(2, 2, 2\)"):
        taught(make_loss(), [[logits(1, 3, 5, 4, 4)]], logits(1, 3, 2, 2, 2), labels(3, 1, 1, 2, 2, 2))


@pytest.mark.parametrize("has_regions", [False, True])
def test_voxels_that_nnunet_ignores_are_left_out(has_regions):
    shape, keep = (4, 3, 2), 2
    student, teacher = logits(1, 3, *shape), logits(1, 3, *shape, seed=1)
    target = labels(2, 1, 4 if has_regions else 1, *shape)
    if has_regions:
        target[:, -1:] = 0
    kept = target[:, : 3 if has_regions else 1, :keep]
    expected = divergence(make_loss(has_regions=has_regions), [[teacher[:, :, :keep]]], student[:, :, :keep], kept)
    target[:, -1:, keep:] = 1 if has_regions else 3
    loss = make_loss(has_regions=has_regions, ignore_label=3)
    assert divergence(loss, [[teacher]], student, target) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("has_regions", [False, True])
def test_a_patch_that_is_ignored_as_a_whole_has_no_divergence(has_regions):
    target = torch.full((1, 4 if has_regions else 1, 2, 2, 2), 1.0 if has_regions else 3.0).double()
    loss = make_loss(has_regions=has_regions, ignore_label=3)
    assert divergence(loss, [[logits(1, 3, 2, 2, 2)]], logits(1, 3, 2, 2, 2, seed=1), target) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_compared_in_float32(dtype):
    student, teacher = logits(1, 3, 4, 4, 4).to(dtype), 100 * logits(1, 3, 4, 4, 4, seed=1).to(dtype)
    target = labels(3, 1, 1, 4, 4, 4)
    found = divergence(make_loss(), [[teacher]], student, target)
    assert found == pytest.approx(divergence(make_loss(), [[teacher.double()]], student.double(), target), rel=1e-5)


def test_probabilities_that_vanish_give_numbers():
    sure = torch.tensor([1e4, -1e4]).reshape(1, 2, 1, 1, 1).expand(1, 2, 4, 4, 4)
    student = torch.zeros(1, 2, 2, 2, 2, requires_grad=True)
    value = taught(make_loss(weight=1.0, temperature=1.0), [[sure]], student, torch.zeros(1, 1, 2, 2, 2))
    value.backward()
    assert float(value.detach()) == pytest.approx(math.log(2), rel=1e-6)
    assert bool(student.grad.isfinite().all())


ENTRY = {"teacher": "Dataset901_Isotropic/run", "checkpoint": "checkpoint_final.pth", "sha256": {"0": SHA}}


def test_plans_without_a_teacher_have_no_distillation():
    assert Distillation.from_plans({}) is None
    assert Distillation.from_plans({"medmamba": {"schedule": {}}}) is None


def test_what_plans_say_is_read_back():
    distillation = Distillation(**ENTRY, weight=0.25, temperature=4)
    assert Distillation.from_plans({"medmamba": {"distillation": distillation.to_dict()}}) == distillation


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"weight": 1.5}, "weight is 1.5; expected a number from 0 to 1"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"temperature": 0}, "temperature is 0; expected a number above 0"),
        ({"teacher": ""}, "teacher is ''; expected a text"),
        ({"sha256": {}}, "64 hexadecimal digits"),
        ({"sha256": {"0": "abc"}}, "64 hexadecimal digits"),
        ({"wieght": 1}, r"unknown entries \['wieght'\]"),
    ],
    ids=str,
)
def test_a_bad_entry_is_refused(entries, message):
    with pytest.raises(DistillationError, match=message):
        Distillation.from_plans({"medmamba": {"distillation": {**ENTRY, **entries}}})


def test_a_missing_entry_is_refused():
    entry = {name: value for name, value in ENTRY.items() if name != "sha256"}
    with pytest.raises(DistillationError, match=r"lacks \['sha256'\]"):
        Distillation.from_plans({"medmamba": {"distillation": entry}})
