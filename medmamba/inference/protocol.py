"""What the folder runner asks of whatever predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from .reading import Image


@dataclass(frozen=True)
class Prediction:
    """What a predictor says about one case.

    Attributes:
        labels: (D, H, W) uint8 or uint16, in the order of the image's own voxels.
        facts: anything worth a line in the report: plain values that JSON can hold, by name.
    """

    labels: NDArray[Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Predictor(Protocol):
    """A model that is ready to predict.

    Attributes:
        id: of the model: equal for equal weights and plans.
        labels: name of every label that can occur, by value; 0 is the background.
        channel_names: one per image of a case, in their order, e.g. ("CT",).
    """

    @property
    def id(self) -> str: ...

    @property
    def labels(self) -> Mapping[int, str]: ...

    @property
    def channel_names(self) -> Sequence[str]: ...

    def predict(self, channels: Sequence[Image], *, should_stop: Callable[[], bool]) -> Prediction:
        """Segment one case.

        Args:
            channels: one image per channel, all on one grid.
            should_stop: to be asked every few seconds, e.g. between tiles.

        Raises:
            Stopped: ``should_stop`` said so (:class:`medmamba.stop.Stopped`).
            ImageRefused: images that this model must not be used on.
            Exception: anything else is reported as this case's failure, and the next case follows.
        """
        ...
