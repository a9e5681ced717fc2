"""Does pretraining help on real CTs? Pretrain, fine-tune with nnU-Net, probe, and compare with training from scratch.

    python pretrain/results/transfer.py WORK_FOLDER prepare LABELLED_DATASET UNLABELLED_FOLDER...
    python pretrain/results/transfer.py WORK_FOLDER pretrain [--jobs 2]
    python pretrain/results/transfer.py WORK_FOLDER finetune [--jobs 2]
    python pretrain/results/transfer.py WORK_FOLDER probe [--jobs 2]
    python pretrain/results/transfer.py WORK_FOLDER reconstruct [--jobs 2]
    python pretrain/results/transfer.py WORK_FOLDER collect OUT_FOLDER

Each part needs those above it, and starts only what has no result yet; it can be interrupted and called again.

``LABELLED_DATASET`` is in nnU-Net's raw layout, one case per patient. 30 of its cases, the same for all arms, are for
testing; a seed has 20 labelled cases of its own, the first 5 of which are its small training set. None of the 100
cases is in the corpus: `prepare` has ``medmamba pretrain ingest`` exclude them by content, and looks.

Arms differ in the initial values of the encoder alone; decoder, head, plans, schedule, order of the crops and
augmentation are the same for all arms of a seed.

==========  ==========================================================================================
scratch     the initial values with which the pretraining of the same seed begins
token       pretrained, a learned token at the masked positions of the coarsest scale
linear      pretrained, linear interpolation along the scan there
toki        pretrained, gated token interpolation there
shuffled    toki, with the values of every tensor permuted within it: what the scale of the values does
==========  ==========================================================================================

Protocols: ``finetune`` trains everything with nnU-Net (the function behind ``nnUNetv2_train``, seeded, with
``-pretrained_weights``); ``probe`` trains one 1x1 layer on the frozen encoder (``probe.py``). Both are scored by the
Dice of nnU-Net's sliding-window prediction, without mirroring, at the spacing of the labels. ``reconstruct`` compares
the pretraining's own error, on CTs of the test cases, with what needs no training (``inpainting.py``).

Measured cost in CPU seconds of one thread each (AMD EPYC): prepare 60; a pretraining 267 (0.33 per step, 800 steps),
9 of them; a training of nnU-Net about 350 (0.65 per iteration with augmentation, 480 iterations; 7 to start; 35 for 30
test cases and their scores), 30 of them; both probes of an encoder 52, 15 of them; a reconstruction 8, 9 of them. In
all about four hours of one core; a third more where other work has the caches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

RECIPE = "ct-small"
FILLS = ("token", "linear", "toki")
ARMS = ("scratch", *FILLS, "shuffled")
#: Whose values the arm "shuffled" permutes.
SHUFFLED_FILL = "toki"
SEEDS = (0, 1, 2)
LABELS = (5, 20)
TEST_CASES = 30
PLANS = "nnUNetTransferPlans"
CONFIGURATION = "3d_fullres"
SCHEDULE = {
    "epochs": 16,
    "iterations": 30,
    "val-iterations": 1,
    "warmup-epochs": 1,
    "optimizer": "AdamW",
    "lr": 1e-2,
    "eps": 1e-8,
}
BATCH_SIZE = 2
_SPLIT_SEED = 20240815


@dataclass(frozen=True)
class Work:
    """Where everything lies below one folder."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def heldout(self) -> Path:
        """Corpus of the test cases, for `reconstruct`."""
        return self.folder / "heldout"

    @property
    def dataset(self) -> str:
        (name,) = (path.name for path in (self.folder / "raw").iterdir())
        return name

    @property
    def number(self) -> str:
        return str(int(self.dataset[7:10]))

    @property
    def preprocessed(self) -> Path:
        return self.folder / "preprocessed" / self.dataset

    def run(self, fill: str, seed: int) -> Path:
        """Folder of a pretraining."""
        return self.folder / "pretrain" / f"{fill}_{seed}"

    def encoder(self, arm: str, seed: int) -> Path:
        if arm in FILLS:
            return self.run(arm, seed) / "encoder.safetensors"
        return self.folder / "encoders" / f"{arm}_{seed}.safetensors"

    def init(self, arm: str, seed: int) -> Path:
        """What `-pretrained_weights` takes."""
        return self.folder / "init" / f"{arm}_{seed}.pth"

    def summary(self, arm: str, labels: int, seed: int) -> Path:
        """What nnU-Net writes behind the validation of a training."""
        model = f"{_trainer()}__{PLANS}__{CONFIGURATION}"
        fold = f"fold_{fold_of(labels, seed)}"
        return self.folder / "results" / arm / self.dataset / model / fold / "validation" / "summary.json"

    def probe(self, arm: str, seed: int) -> Path:
        return self.folder / "probe" / f"{arm}_{seed}.json"

    def reconstruction(self, fill: str, seed: int) -> Path:
        return self.folder / "reconstruction" / f"{fill}_{seed}.json"

    def environment(self, **more: str) -> dict[str, str]:
        """For nnU-Net's and our commands. Augmentation in the training process: the seed decides it."""
        folders = {f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}
        processes = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **folders, **processes, **more}


# Splits


def split_cases(cases: Iterable[str]) -> tuple[list[str], dict[int, list[str]]]:
    """Test cases, and the labelled cases of every seed in the order in which they are used.

    Args:
        cases: of different patients.

    Returns:
        ``TEST_CASES`` names, sorted, and ``max(LABELS)`` names per seed; no name is in two of these lists.

    Raises:
        ValueError: there are too few.
    """
    names, most = sorted(set(cases)), max(LABELS)
    if len(names) < TEST_CASES + most * len(SEEDS):
        raise ValueError(f"{len(names)} cases are too few for {TEST_CASES} and {len(SEEDS)} x {most}")
    random.Random(_SPLIT_SEED).shuffle(names)
    test, pool = names[:TEST_CASES], names[TEST_CASES:]
    return sorted(test), {seed: pool[i * most : (i + 1) * most] for i, seed in enumerate(SEEDS)}


def splits_final(test: Sequence[str], labelled: Mapping[int, Sequence[str]]) -> list[dict[str, list[str]]]:
    """Content of nnU-Net's ``splits_final.json``; its index is :func:`fold_of`."""
    return [{"train": list(labelled[seed][:labels]), "val": list(test)} for labels in LABELS for seed in SEEDS]


def fold_of(labels: int, seed: int) -> int:
    """The fold of a number of labelled cases and a seed."""
    return LABELS.index(labels) * len(SEEDS) + SEEDS.index(seed)


def labels_and_seed(fold: int) -> tuple[int, int]:
    """Inverse of :func:`fold_of`."""
    labels, seed = divmod(fold, len(SEEDS))
    return LABELS[labels], SEEDS[seed]


# Encoders


def shuffled(tensors: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Tensors with the same values in another order, drawn for each of them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
        for name, value in tensors.items()
    }


def write_scratch_encoder(work: Work, seed: int) -> None:
    """The encoder with which the pretraining of a seed begins."""
    import torch

    from medmamba.networks import create_network
    from medmamba_pretrain.corpus.store import Store
    from medmamba_pretrain.loop.export import write_run_encoder

    recipe = _recipe(f"seed={seed}")
    torch.manual_seed(seed)
    network = create_network(recipe.network, 1, 2, **recipe.network_arguments)
    path = work.encoder("scratch", seed)
    path.parent.mkdir(exist_ok=True)
    write_run_encoder(path, network.encoder, recipe, Store(work.corpus), 0)


def write_shuffled_encoder(work: Work, seed: int) -> None:
    """The pretrained encoder of a seed with its values permuted."""
    from dataclasses import replace

    from medmamba.weights.encoder import described_encoder, read_encoder, write_encoder

    description, tensors = read_encoder(work.encoder(SHUFFLED_FILL, seed))
    encoder = described_encoder(description).to_empty(device="cpu")
    encoder.load_state_dict(shuffled(tensors, seed))
    training = {**description.training, "shuffled": True}
    write_encoder(work.encoder("shuffled", seed), encoder, replace(description, training=training))


def _recipe(*changes: str) -> Any:
    from medmamba_pretrain.recipe import read_recipe

    return read_recipe(RECIPE, changes)


def _trainer() -> str:
    from medmamba.nnunet.names import trainer_name

    return trainer_name(_recipe().network)


# Prepare


def prepare(work: Work, labelled: Path, unlabelled: Sequence[Path]) -> None:
    """Corpora, splits, encoders of the arm scratch, plans and preprocessed data."""
    for name in ("raw", "preprocessed", "results", "encoders", "init", "probe", "pretrain", "reconstruction", "logs"):
        (work.folder / name).mkdir(parents=True, exist_ok=True)
    link = work.folder / "raw" / labelled.name
    if not link.exists():
        link.symlink_to(labelled)
    ending = json.loads((labelled / "dataset.json").read_text())["file_ending"]
    cases = [path.name.removesuffix(ending) for path in (labelled / "labelsTr").glob(f"*{ending}")]
    test, training = split_cases(cases)
    ingest(work, labelled / "imagesTr", unlabelled, [labelled / "imagesTr" / f"{case}_0000{ending}" for case in test])
    check_apart(work, len(cases))
    for seed in SEEDS:
        if not work.encoder("scratch", seed).exists():
            write_scratch_encoder(work, seed)
    plan(work)
    (work.preprocessed / "splits_final.json").write_text(json.dumps(splits_final(test, training), indent=4))
    if len(list(work.preprocessed.glob(f"{PLANS}_{CONFIGURATION}/*.pkl"))) < len(cases):
        run(work, *f"nnUNetv2_preprocess -d {work.number} -plans_name {PLANS} -c {CONFIGURATION} -np 1".split())


def plan(work: Work) -> None:
    """Plans that fit the encoders, with the schedule; and the first file for ``-pretrained_weights``."""
    schedule = [word for name, value in SCHEDULE.items() for word in (f"--{name}", str(value))]
    init = ["--init", str(work.init("scratch", SEEDS[0])), "--seed", str(SEEDS[0])]
    like = ["--like", str(work.encoder("scratch", SEEDS[0])), "--plans-name", PLANS, "-np", "1"]
    run(work, "medmamba", "plan", "-d", work.number, *like, *init, "--batch-size", str(BATCH_SIZE), *schedule)


def ingest(work: Work, images: Path, unlabelled: Sequence[Path], tests: Sequence[Path]) -> None:
    """The corpus without the labelled dataset's images, and another one of the test cases alone."""
    exclude = work.folder / "exclude.txt"
    exclude.write_text(f"{images}\n")
    spacing = [f"{size:g}" for size in _recipe().spacing_mm]
    options = ["--jobs", "1", "--spacing", *spacing]
    run(work, "medmamba", "pretrain", "ingest", *map(str, unlabelled), "--out", str(work.corpus), *options,
        "--list-exclude", str(exclude))  # fmt: skip
    links = work.folder / "heldout_images"
    links.mkdir(exist_ok=True)
    for path in tests:
        if not (links / path.name).exists():
            (links / path.name).symlink_to(path)
    run(work, "medmamba", "pretrain", "ingest", str(links), "--out", str(work.heldout), *options)


def check_apart(work: Work, labelled: int) -> None:
    """Stop unless every labelled case was read for exclusion, and no content of one is in the corpus."""
    from medmamba_pretrain.corpus.store import Store

    corpus, tests = Store(work.corpus), Store(work.heldout)
    excluded = {record.volume for record in corpus.records.values() if record.status == "excluded"}
    common = excluded & corpus.accepted.keys()
    if len(excluded - {None}) < labelled or common or not tests.accepted.keys() <= excluded:
        raise SystemExit(
            f"{work.corpus}: {len(excluded)} of {labelled} labelled cases excluded, {len(common)} of them in the corpus"
        )
    print(f"{len(corpus.accepted)} volumes in the corpus, none of them one of the {len(excluded)} excluded")


def run(work: Work, *command: str) -> None:
    subprocess.run(command, check=True, env=work.environment(nnUNet_n_proc_DA="1"), stdout=subprocess.DEVNULL)


# Pretrain


def pretrain(work: Work, fill: str, seed: int) -> None:
    """One pretraining, or what is left of it."""
    command = ["pretrain", "run", RECIPE, "--corpus", str(work.corpus), "--out", str(work.run(fill, seed))]
    run(work, "medmamba", *command, "--device", "cpu", "--set", f"fill={fill}", "--set", f"seed={seed}")


def is_pretrained(work: Work, fill: str, seed: int) -> bool:
    """Whether a pretraining made its last step."""
    from medmamba.weights import WeightsError, read_encoder

    try:
        description, _ = read_encoder(work.encoder(fill, seed))
    except WeightsError:
        return False
    return description.training["steps"] == _recipe().steps


# Fine-tune


def finetune(work: Work, arm: str, seed: int, labels: int) -> None:
    """One training of nnU-Net and its prediction of the test cases, in this process."""
    make_init(work, arm, seed)
    os.environ.update(work.environment(nnUNet_results=str(work.folder / "results" / arm)))
    from medmamba.nnunet.names import EXT_TRAINER, ext_trainer_value

    os.environ[EXT_TRAINER] = ext_trainer_value()
    seed_everything(seed)
    import torch
    from nnunetv2.run.run_training import run_training
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    validate = nnUNetTrainer.perform_actual_validation

    def without_mirroring(trainer: Any, save_probabilities: bool = False) -> None:
        # One forward pass per tile instead of eight, for all arms.
        trainer.inference_allowed_mirroring_axes = None
        validate(trainer, save_probabilities)

    nnUNetTrainer.perform_actual_validation = without_mirroring
    fold, weights = fold_of(labels, seed), str(work.init(arm, seed))
    run_training(work.dataset, CONFIGURATION, fold, _trainer(), PLANS, weights, device=torch.device("cpu"))


def make_init(work: Work, arm: str, seed: int) -> None:
    """The file for ``-pretrained_weights``: the arm's encoder, and the seed's decoder."""
    if work.init(arm, seed).exists():
        return
    like = ["--like", str(work.encoder(arm, seed)), "--from", PLANS]
    init = ["--init", str(work.init(arm, seed)), "--seed", str(seed)]
    run(work, "medmamba", "plan", "-d", work.number, *like, *init)


def seed_everything(seed: int) -> None:
    """Of heads, crops and augmentation; nnU-Net draws from the global generators."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    os.environ.update(MEDMAMBA_SEED=str(seed), MEDMAMBA_REHEARSAL="0")  # of our trainers
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (it is nnU-Net's generator)
    torch.manual_seed(seed)


# Probe


def probe(work: Work, arm: str, seed: int) -> None:
    """The Dice of linear probes on a frozen encoder, one per number of labels."""
    import torch
    from probe import Fit, LinearProbe, draw_crops, fit

    from medmamba.networks import create_network
    from medmamba.weights import load_encoder, read_encoder

    os.environ.update(work.environment())
    seed_everything(seed)
    data = Preprocessed(work)
    description, tensors = read_encoder(work.encoder(arm, seed))
    splits = json.loads((work.preprocessed / "splits_final.json").read_text())
    scores = {}
    for labels in LABELS:
        split = splits[fold_of(labels, seed)]
        cases = [data.load(case)[:2] for case in split["train"]]
        images, truths = [case[0] for case in cases], [case[1] for case in cases]
        crops, masks = draw_crops(images, truths, description.patch_size, Fit().crops, seed)
        network = create_network(description.network, 1, data.classes, **description.arguments)
        load_encoder(network, tensors, description)
        model = LinearProbe(network.encoder, data.classes, torch.from_numpy(crops[:1]))
        fit(model, crops, masks, Fit(), seed)
        scores[labels] = {case: data.dice(model, case) for case in split["val"]}
    _write_json(work.probe(arm, seed), scores)


class Preprocessed:
    """nnU-Net's preprocessed cases, and its prediction of them with any network."""

    def __init__(self, work: Work) -> None:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        self._folder = work.preprocessed
        self._dataset_json = json.loads((self._folder / "dataset.json").read_text())
        self._plans = PlansManager(str(self._folder / f"{PLANS}.json"))
        self._configuration = self._plans.get_configuration(CONFIGURATION)
        self._labels = self._plans.get_label_manager(self._dataset_json)
        folder = str(self._folder / self._configuration.data_identifier)
        self._cases = infer_dataset_class(folder)(folder)
        self.classes: int = self._labels.num_segmentation_heads

    def load(self, case: str) -> tuple[Any, Any, Any]:
        """Image (C, D, H, W), label (D, H, W), and what nnU-Net needs to undo its preprocessing."""
        image, label, _, properties = self._cases.load_case(case)
        return image[:], label[:][0], properties

    def dice(self, network: Any, case: str) -> dict[str, float]:
        """Dice per structure, at the spacing of the labels."""
        import torch
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        from medmamba.inference.metrics import dice

        image, _, properties = self.load(case)
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.manual_initialization(
            network, self._plans, self._configuration, None, self._dataset_json, "nnUNetTrainer", None
        )
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image))
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self._plans, self._configuration, self._labels, properties
        )
        path = self._folder / "gt_segmentations" / f"{case}{self._dataset_json['file_ending']}"
        truth = self._plans.image_reader_writer_class().read_seg(str(path))[0][0]
        labels = {name: label for name, label in self._dataset_json["labels"].items() if label}
        return {name: dice(found == label, truth == label) for name, label in labels.items()}


def _write_json(path: Path, content: Any) -> None:
    from medmamba.files import write_atomically

    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1)))


# Reconstruct


def reconstruct(work: Work, fill: str, seed: int) -> None:
    """Mean squared error of masked, normalised units, by the pretrained model and without any training.

    One crop of every test case with one mask, the same for all models. An inpainted unit is normalised by itself, as
    the target is; ``_scaled`` is the error after the best single factor, which is at most that of predicting 0.
    """
    import numpy as np
    import torch
    from inpainting import harmonic, nearest

    from medmamba_pretrain.corpus.crops import CropReader
    from medmamba_pretrain.loop.normalisation import normalise
    from medmamba_pretrain.loop.stream import crop_of
    from medmamba_pretrain.loss import normalised_units, split_units
    from medmamba_pretrain.masking import mask_at

    torch.set_num_threads(1)
    recipe = _recipe(f"fill={fill}", f"seed={seed}")
    model = load_pretraining(work, recipe)
    reader = CropReader(work.heldout, recipe.patch_size)
    pairs: dict[str, list[tuple[Any, Any]]] = {"model": [], "nearest": [], "harmonic": []}
    for volume in reader.ids:
        crop = crop_of(reader, recipe, model.units, np.random.default_rng(int(volume, 16)), volume=volume)
        image = normalise(crop.stored[None], crop.constants[None])
        masked = ~crop.visible
        target = normalised_units(image, model.units)[0][masked]
        with torch.no_grad():
            predicted = split_units(model.predict(image, crop.visible[None]), model.units)[0][masked]
        pairs["model"].append((predicted, target))
        seen = mask_at(crop.visible[None], recipe.patch_size)[0].numpy()
        for name, inpaint in (("nearest", nearest), ("harmonic", harmonic)):
            filled = torch.from_numpy(inpaint(image[0, 0].numpy(), seen))[None, None]
            pairs[name].append((normalised_units(filled, model.units)[0][masked], target))
    errors = {}
    for name, found in pairs.items():
        predicted, target = (torch.cat(values) for values in zip(*found, strict=True))
        errors[f"mse_{name}"] = float((predicted - target).square().mean())
        factor = (predicted * target).sum() / predicted.square().sum()
        errors[f"mse_{name}_scaled"] = float((factor * predicted - target).square().mean())
        errors["mse_unit_mean"] = float(target.square().mean())
    _write_json(work.reconstruction(fill, seed), {"volumes": len(reader.ids), **errors})


def load_pretraining(work: Work, recipe: Any) -> Any:
    """The whole model of a finished run: encoder, fills and decoder."""
    from medmamba.networks import create_network
    from medmamba_pretrain.loop.checkpoints import Checkpoints
    from medmamba_pretrain.model import Pretraining

    network = create_network(recipe.network, 1, 2, **recipe.network_arguments)
    model = Pretraining(network, recipe)
    state = Checkpoints(work.run(recipe.fill, recipe.seed)).latest()
    if state is None or state["step"] != recipe.steps:
        raise SystemExit(f"{work.run(recipe.fill, recipe.seed)} holds no finished run; start the part pretrain")
    model.load_state_dict(state["model"])
    return model.eval()


# Collect


@dataclass(frozen=True)
class Scores:
    """Dice of one network on the test cases.

    Attributes:
        protocol: "finetune" or "probe".
        arm, labels, seed: of the network.
        dice: case -> structure -> Dice; NaN where neither segmentation has the structure.
    """

    protocol: str
    arm: str
    labels: int
    seed: int
    dice: Mapping[str, Mapping[str, float]]

    @property
    def structures(self) -> list[str]:
        return list(next(iter(self.dice.values())))

    def of(self, structure: str) -> dict[str, float]:
        """Dice per case; of "mean", the mean over the structures that a case has."""
        import numpy as np

        if structure != "mean":
            return {case: dice[structure] for case, dice in self.dice.items()}
        return {case: float(np.nanmean(list(dice.values()))) for case, dice in self.dice.items()}


def finetuned_scores(work: Work) -> Iterator[Scores]:
    """Of every finished training, from what nnU-Net wrote."""
    from medmamba_plans.results import find_results

    for arm in ARMS:
        folder = work.folder / "results" / arm / work.dataset
        if not list(folder.glob("*/fold_*/validation/summary.json")):
            continue
        for result in find_results([folder]):
            labels, seed = labels_and_seed(int(result.fold))
            dice = {
                case: dict(zip(result.classes, map(float, row), strict=True))
                for case, row in zip(result.cases, result.dice, strict=True)
            }
            yield Scores("finetune", arm, labels, seed, dice)


def probed_scores(work: Work) -> Iterator[Scores]:
    """Of every finished probe."""
    for arm in ARMS:
        for seed in SEEDS:
            if work.probe(arm, seed).exists():
                for labels, dice in json.loads(work.probe(arm, seed).read_text()).items():
                    yield Scores("probe", arm, int(labels), seed, dice)


def rows_of(scores: Iterable[Scores]) -> list[dict[str, Any]]:
    """One row per network."""
    return [
        {
            "protocol": one.protocol,
            "arm": one.arm,
            "labels": one.labels,
            "seed": one.seed,
            "cases": len(one.dice),
            "dice_mean": _mean(one.of("mean").values()),
            **{f"dice_{name}": _mean(one.of(name).values()) for name in one.structures},
            "source": "measured",
        }
        for one in scores
    ]


def _mean(values: Iterable[float]) -> float:
    """Of what is not NaN, rounded; NaN if there is nothing."""
    known = [value for value in values if not math.isnan(value)]
    return round(sum(known) / len(known), 4) if known else float("nan")


#: What is compared with what.
COMPARISONS = (
    *((arm, "scratch") for arm in ARMS[1:]),
    *((fill, "shuffled") for fill in FILLS),
    ("toki", "token"),
    ("toki", "linear"),
)


def paired_rows(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """Paired differences of two arms, per protocol, number of labels and structure.

    The interval over cases takes each case's difference averaged over the seeds, and speaks about further cases with
    these networks; that over seeds takes each seed's mean difference, and speaks about further seeds (labelled cases,
    pretraining, decoder).
    """
    by_arm: dict[tuple[str, int, str], list[Scores]] = {}
    for one in scores:
        by_arm.setdefault((one.protocol, one.labels, one.arm), []).append(one)
    rows = []
    for protocol in ("finetune", "probe"):
        for labels in LABELS:
            for first, second in COMPARISONS:
                a, b = (by_arm.get((protocol, labels, arm), []) for arm in (first, second))
                common = sorted({one.seed for one in a} & {one.seed for one in b})
                if common:
                    pairs = [[next(one for one in of if one.seed == seed) for of in (a, b)] for seed in common]
                    facts = {"protocol": protocol, "labels": labels, "first": first, "second": second}
                    rows += [
                        {**facts, "structure": structure, "seeds": len(common), **difference(pairs, structure)}
                        for structure in ("mean", *a[0].structures)
                    ]
    return rows


def difference(pairs: Sequence[Sequence[Scores]], structure: str) -> dict[str, Any]:
    """First minus second, from one pair of scores per seed."""
    import numpy as np
    from scipy import stats

    delta = np.array(
        [[first.of(structure)[case] - second.of(structure)[case] for case in first.dice] for first, second in pairs]
    )
    delta = delta[:, np.isfinite(delta).all(0)]
    of_cases, of_seeds = delta.mean(0), delta.mean(1)
    p = float(stats.wilcoxon(of_cases).pvalue) if of_cases.any() else 1.0
    low, high = interval(of_cases)
    low_seeds, high_seeds = interval(of_seeds)
    return {
        "cases": len(of_cases),
        "dice_difference": round(float(of_cases.mean()), 4),
        "low_95_cases": low,
        "high_95_cases": high,
        "p_wilcoxon_cases": float(f"{p:.2g}"),
        "low_95_seeds": low_seeds,
        "high_95_seeds": high_seeds,
        "differences_of_seeds": " ".join(f"{value:.4f}" for value in of_seeds),
    }


def interval(values: Any) -> tuple[Any, Any]:
    """95 % confidence interval of the mean (Student's t), rounded; empty for a single value."""
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return "", ""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return round(float(np.mean(values) - half), 4), round(float(np.mean(values) + half), 4)


def collect(work: Work, out: Path) -> None:
    """Write ``transfer.csv``, ``transfer_paired.csv`` and ``transfer_reconstruction.csv``."""
    from medmamba_plans.results import write_csv

    scores = [*finetuned_scores(work), *probed_scores(work)]
    write_csv(out / "transfer.csv", rows_of(scores))
    write_csv(out / "transfer_paired.csv", paired_rows(scores))
    reconstructions = [
        {"fill": fill, "seed": seed, **json.loads(work.reconstruction(fill, seed).read_text()), "source": "measured"}
        for fill in FILLS
        for seed in SEEDS
        if work.reconstruction(fill, seed).exists()
    ]
    write_csv(out / "transfer_reconstruction.csv", [_rounded(row) for row in reconstructions])


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


# Start


def missing(work: Work, part: str) -> list[tuple[str, ...]]:
    """Arguments of what a part still has to do, all arms of a seed together."""
    if part in ("pretrain", "reconstruct"):
        is_done = partial(is_pretrained, work) if part == "pretrain" else lambda *of: work.reconstruction(*of).exists()
        todo = [(fill, str(seed)) for seed in SEEDS for fill in FILLS if not is_done(fill, seed)]
    elif part == "probe":
        todo = [(arm, str(seed)) for seed in SEEDS for arm in ARMS if not work.probe(arm, seed).exists()]
    else:
        todo = [
            (arm, str(seed), str(labels))
            for seed in SEEDS
            for labels in LABELS
            for arm in ARMS
            if not work.summary(arm, labels, seed).exists()
        ]
    return todo


def launch(work: Work, part: str, arguments: Sequence[str]) -> None:
    """Do one thing of a part in a process of its own."""
    name = "_".join((part, *arguments))
    log = work.folder / "logs" / f"{name}.log"
    command = [sys.executable, __file__, str(work.folder), part, "--one", *arguments]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=work.environment())
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    outcome = "done" if process.returncode == 0 else f"FAILED, see {log}"
    print(f"{name}: {outcome}, {used.ru_utime + used.ru_stime:.0f} CPU seconds", flush=True)


def start(work: Work, part: str, jobs: int) -> int:
    """Do what is missing of a part; 1 if something is left."""
    if part in ("finetune", "probe"):
        for seed in SEEDS:
            if not work.encoder("shuffled", seed).exists() and is_pretrained(work, SHUFFLED_FILL, seed):
                write_shuffled_encoder(work, seed)
    todo = missing(work, part)
    if part == "finetune":
        # Before the trainings of two numbers of labels want the same file.
        for arm, seed in dict.fromkeys((arm, int(seed)) for arm, seed, _ in todo):
            if work.encoder(arm, seed).exists():
                make_init(work, arm, seed)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(launch, work, part), todo))
    left = missing(work, part)
    print(f"{part}: {len(left)} of {len(todo)} without a result" if left else f"{part}: complete")
    return 1 if left else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for data and results")
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("prepare", help=prepare.__doc__)
    first.add_argument("labelled", type=Path, help="dataset in nnU-Net's raw layout")
    first.add_argument("unlabelled", type=Path, nargs="+", help="folders of CTs")
    for name, do in ONE.items():
        part = parts.add_parser(name, help=(do.__doc__ or "").partition("\n")[0])
        part.add_argument("--jobs", type=int, default=1, help="at the same time, one core each")
        part.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    last = parts.add_parser("collect", help=collect.__doc__)
    last.add_argument("out", type=Path, help="folder for the tables")
    arguments = parser.parse_args()
    work = Work(arguments.work.resolve())
    if arguments.part == "prepare":
        prepare(work, arguments.labelled.resolve(), [path.resolve() for path in arguments.unlabelled])
    elif arguments.part == "collect":
        collect(work, arguments.out)
    elif arguments.one:
        name, seed, *labels = arguments.one
        ONE[arguments.part](work, name, int(seed), *map(int, labels))
    else:
        return start(work, arguments.part, arguments.jobs)
    return 0


ONE = {"pretrain": pretrain, "finetune": finetune, "probe": probe, "reconstruct": reconstruct}


if __name__ == "__main__":
    sys.exit(main())
