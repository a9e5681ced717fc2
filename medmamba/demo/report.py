"""What the demo says at its end: a table of scores, a JSON file and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medmamba.demo.dataset import Case, Dataset
from medmamba.demo.volumes import read_volume
from medmamba.inference.metrics import Score, mean_score, score_structures
from medmamba.inference.picture import Panel, draw_picture

TOLERANCE_MM = 1.0

_FOOTER = (
    "Images and labels: Medical Segmentation Decathlon, Task04_Hippocampus (Simpson et al. 2019, Antonelli et al. "
    "2022). This picture is licensed CC BY-SA 4.0."
)


@dataclass(frozen=True)
class Scores:
    """Scores by case and structure.

    Attributes:
        by_case: case name to structure name to score.
    """

    by_case: Mapping[str, Mapping[str, Score]]

    @property
    def structures(self) -> list[str]:
        return list(next(iter(self.by_case.values())))

    @property
    def mean(self) -> Score:
        """Over cases and structures; what is absent from reference and prediction does not count."""
        return mean_score([score for case in self.by_case.values() for score in case.values()])

    def of_case(self, name: str) -> Score:
        return mean_score(list(self.by_case[name].values()))

    def of_structure(self, name: str) -> Score:
        return mean_score([case[name] for case in self.by_case.values()])

    def table(self) -> list[str]:
        """Lines of a table: a row per case, Dice and NSD per structure."""
        columns = [*self.structures, "mean"]
        rows = [
            [name, *(_two(score) for score in case.values()), _two(self.of_case(name))]
            for name, case in self.by_case.items()
        ]
        rows.append(["mean", *(_two(self.of_structure(name)) for name in self.structures), _two(self.mean)])
        first = max(len(row[0]) for row in rows)
        widths = [max(len(name), len("Dice   NSD")) for name in columns]
        head = " " * first + "".join(f"   {name:<{width}}" for name, width in zip(columns, widths, strict=True))
        unit = " " * first + "".join(f"   {'Dice   NSD':<{width}}" for width in widths)
        body = [
            f"{row[0]:<{first}}" + "".join(f"   {cell:<{width}}" for cell, width in zip(row[1:], widths, strict=True))
            for row in rows
        ]
        return [line.rstrip() for line in (head, unit, *body)]

    def to_json(self) -> dict[str, Any]:
        """Plain values; null stands for a structure that is absent from reference and prediction."""
        return {
            "mean": _plain(self.mean),
            "cases": {
                name: {structure: _plain(score) for structure, score in case.items()}
                for name, case in self.by_case.items()
            },
        }


def score_predictions(dataset: Dataset, predictions: Path) -> Scores:
    """Score the unseen cases of a dataset.

    Args:
        dataset: its reference label maps are read.
        predictions: folder with one label map per unseen case.

    Raises:
        RuntimeError, ValueError: a prediction cannot be read or lies on another grid.
    """
    by_case = {}
    for case in dataset.unseen:
        reference = read_volume(case.label)
        by_case[case.name] = score_structures(
            read_volume(_prediction(case, predictions)).array.astype(int),
            reference.array.astype(int),
            dataset.structures,
            spacing_mm=reference.spacing_mm,
            tolerance_mm=TOLERANCE_MM,
        )
    return Scores(by_case)


def draw_predictions(path: Path, dataset: Dataset, predictions: Path, scores: Scores) -> None:
    """Draw the unseen cases with reference and prediction.

    Raises:
        RuntimeError, ValueError: as :func:`score_predictions`.
        OSError: the picture cannot be written.
    """
    panels = []
    for case in dataset.unseen:
        image = read_volume(case.images[0], oriented=True)
        reference = read_volume(case.label, oriented=True).array
        prediction = read_volume(_prediction(case, predictions), oriented=True).array
        title = f"{case.name}   Dice {_number(scores.of_case(case.name).dice)}"
        panels.append(Panel(title, image.array, reference, prediction, image.spacing_mm))
    captions = {name: f"Dice {_number(scores.of_structure(name).dice)}" for name in scores.structures}
    footer = _FOOTER if dataset.is_shipped else ""
    draw_picture(path, panels, dataset.structures, captions, footer=footer)


def _prediction(case: Case, folder: Path) -> Path:
    return folder / case.label.name


def _two(score: Score) -> str:
    return f"{_number(score.dice)}  {_number(score.nsd)}"


def _number(value: float) -> str:
    return "  - " if math.isnan(value) else f"{value:.3f}"


def _plain(score: Score) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else round(value, 4) for name, value in asdict(score).items()}
