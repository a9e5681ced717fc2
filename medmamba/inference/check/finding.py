"""One thing that was found about a case."""

from __future__ import annotations

from dataclasses import dataclass

from medmamba.inference.reading import MESSAGES, ImageRefused, Note


@dataclass(frozen=True)
class Finding:
    """What was found, in which file.

    Attributes:
        id: of a catalogue, e.g. "MM-IO-004".
        code: its short name, e.g. "truncated".
        text: one sentence with the numbers and, for a refusal, the remedy.
        file: name of the file; empty when it is about the case.
        refuses: whether the case cannot be predicted.
    """

    id: str
    code: str
    text: str
    file: str = ""
    refuses: bool = True

    @classmethod
    def of(cls, identifier: str, text: str, file: str = "") -> Finding:
        """A message of the catalogue of images."""
        message = MESSAGES[identifier]
        return cls(identifier, message.code, text, file, message.refuses)

    @classmethod
    def of_refusal(cls, refusal: ImageRefused, file: str) -> Finding:
        """What a reader raised."""
        return cls(refusal.id, refusal.code, refusal.text, file)

    @classmethod
    def of_note(cls, note: Note, file: str) -> Finding:
        """What a reader noted."""
        return cls.of(note.id, note.text, file)
