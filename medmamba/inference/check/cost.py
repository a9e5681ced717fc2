"""What prediction takes, for one case and for all, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .finding import Finding


@dataclass(frozen=True)
class Cost:
    """What predicting one case takes at most: nnU-Net crops to what is not 0, and this is not known before.

    Attributes:
        tiles: of the sliding window.
        passes: of a network over one tile: tiles x folds x reflections.
        seconds: of these passes, from one that was timed; None without timing. Reading, resampling and writing come
            on top.
        peak_ram_mb: the most the process holds, MiB; None without timing.
        output_bytes: of the segmentation without compression.
    """

    tiles: int
    passes: int
    seconds: float | None
    peak_ram_mb: int | None
    output_bytes: int


@dataclass(frozen=True)
class Totals:
    """What predicting all cases of a folder takes at most, one after the other.

    Attributes:
        model: its id.
        cases: that were checked.
        predictable: that nothing refuses; all below is about them.
        passes: of a network over one tile.
        passes_per_tile: folds x reflections.
        seconds_per_pass: as timed here, None without timing.
        threads: of torch while it was timed, None without timing.
        seconds: of all passes; None without timing.
        peak_ram_mb: of the case that takes most, MiB.
        usable_ram_mb: of this machine or container, MiB; None if unknown.
        output_bytes: of all segmentations without compression.
        free_bytes: where they go; None if no place was named or its disk does not say.
        findings: about all cases together.
    """

    model: str
    cases: int
    predictable: int
    passes: int
    passes_per_tile: int
    seconds_per_pass: float | None
    threads: int | None
    seconds: float | None
    peak_ram_mb: int | None
    usable_ram_mb: int | None
    output_bytes: int
    free_bytes: int | None
    findings: Sequence[Finding] = ()
