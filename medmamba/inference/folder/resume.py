"""What earlier runs left, and how much of it can be trusted: what verifies, and nothing else."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medmamba.files import sha256_of, temporaries_in
from medmamba.inference.check import Case
from medmamba.inference.writing import verify_segmentation

from .outputs import Outputs
from .report import Record, finished_cases, read_records, unexplained


class Earlier:
    """What the reports of a folder say.

    Args:
        outputs: their reports are read.

    Raises:
        CommandError: a report cannot be read, or is none.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._done: dict[str, list[Record]] = defaultdict(list)
        self._unexplained: dict[str, int] = defaultdict(int)
        for path in outputs.earlier_reports():
            records, _ = read_records(path)
            for record in finished_cases(records):
                if record.get("status") == "done" and record.keys() >= {"model", "settings", "inputs", "output"}:
                    self._done[record["case"]].append(record)
            for name, count in unexplained(records).items():
                self._unexplained[name] += count

    @property
    def is_empty(self) -> bool:
        """Whether no report knows a result."""
        return not self._done

    def is_kept(self, case: Case, model: str, settings: Mapping[str, Any]) -> bool:
        """Whether the output of a case is there, unchanged, and what this run would write."""
        path = self._outputs.path_of(case)
        candidates = [
            record
            for record in self._done[case.id]
            if (record["model"], record["settings"], record["output"]["file"]) == (model, settings, path.name)
        ]
        if not candidates or case.problem is not None or not path.is_file():
            return False
        try:
            hashes = [item["sha256"] for item in inputs_of(case)]
        except OSError:
            return False  # reading it will say why
        return any(
            [item["sha256"] for item in record["inputs"]] == hashes
            and verify_segmentation(path, record["output"]["sha256"]) is None
            for record in candidates
        )

    def attempts(self, case: Case) -> int:
        """How often a run ended without a word while it was at this case."""
        return self._unexplained[case.id]

    def knows(self, case: Case, path: Path) -> bool:
        """Whether a report knows the content of a file that is in the way."""
        return sha256_of(path) in {record["output"]["sha256"] for record in self._done[case.id]}


def inputs_of(case: Case) -> list[dict[str, Any]]:
    """Name, SHA-256 and size of every file of a case; those of a DICOM series together.

    Raises:
        OSError: one cannot be read.
    """
    return [_input(path) for path in case.files]


def remove_partial(outputs: Outputs, cases: Iterable[Case]) -> int:
    """Remove what a kill left half written for these cases; the number of files."""
    names = {outputs.path_of(case).name for case in cases}
    # One look at the folder: with one per case, a large folder on a network file system takes minutes.
    partial = [path for path, name in temporaries_in(outputs.folder).items() if name in names]
    for path in partial:
        path.unlink()
    return len(partial)


def _input(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return {"file": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size}
    files = sorted(item for item in path.iterdir() if item.is_file())
    together = hashlib.sha256("".join(sha256_of(item) for item in files).encode()).hexdigest()
    return {"file": path.name, "sha256": together, "bytes": sum(item.stat().st_size for item in files)}
