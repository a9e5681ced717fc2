"""Why a model package is refused, or cannot be made: every reason has an id."""

from __future__ import annotations

from collections.abc import Mapping

from medmamba.command import printable

#: Id -> what it stands for. Ids are never reused.
PROBLEMS: Mapping[str, str] = {
    # The folder and its checksums.
    "MM-MD-001": "there is no model package at this place",
    "MM-MD-002": "a name leads out of the package, or something in it is no plain file",
    "MM-MD-003": "a file of the package is missing",
    "MM-MD-004": "the package holds a file that does not belong to it",
    "MM-MD-005": "SHA256SUMS is no list of checksums",
    "MM-MD-006": "a file is not the one that was exported: its checksum differs",
    # model.json and MODEL_CARD.md.
    "MM-MD-007": "a text file of the package cannot be read",
    "MM-MD-008": "the package has a newer format than this version of medmamba reads",
    "MM-MD-009": "a value of model.json is missing, unknown, of the wrong type, or contradicts another",
    "MM-MD-010": "the network, or a class it is made of, is none that medmamba builds from a file",
    "MM-MD-011": "a part of the preprocessing is none that medmamba takes from a file",
    # The network and its weights.
    "MM-MD-012": "the network refuses its arguments",
    "MM-MD-013": "the network is larger than its weights",
    "MM-MD-014": "a file of weights cannot be read",
    "MM-MD-015": "the weights do not fit the network",
    "MM-MD-016": "the weights belong to another model.json or another fold",
    "MM-MD-017": "weights are not finite",
    "MM-MD-018": "the model has no such fold",
    "MM-MD-019": "int8 weights or their scales are none that an export writes",
    # Export.
    "MM-MD-030": "the folder is no trained folder of nnU-Net",
    "MM-MD-031": "a fold or its checkpoint is missing",
    "MM-MD-032": "a checkpoint cannot be read without running code, or is damaged",
    "MM-MD-033": "the configuration needs the result of another model",
    "MM-MD-034": "folds were not trained with the plans of the folder, or not alike",
    "MM-MD-035": "the trainer may have built another network than the plans name",
    "MM-MD-036": "weights are too large for the type in which they are to be stored",
    "MM-MD-037": "the place of the package is taken or missing",
    "MM-MD-038": "the weights of the package are rounded or calibrated already",
}

_LONGEST = 120


class ModelRefused(ValueError):
    """A model package that is not loaded, or not written. One line: what is wrong, where, and what to do.

    Args:
        code: key of ``PROBLEMS``.
        text: the line, without the code; what a terminal cannot print is escaped.
    """

    def __init__(self, code: str, text: str) -> None:
        assert code in PROBLEMS, code
        super().__init__(code, text)
        self.code = code
        self.text = printable(text)

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


def shown(value: object) -> str:
    """A value of a foreign file in one short line that a terminal can print."""
    text = repr(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return printable(text)
