"""One thing that was found about a case."""

from __future__ import annotations

from dataclasses import dataclass

from medmamba.inference.reading import MESSAGES, ImageRefused, Note

from .messages import MODEL_MESSAGES

_CATALOGUE = {**MESSAGES, **MODEL_MESSAGES}


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
        """A message of the catalogues of images and of models."""
        message = _CATALOGUE[identifier]
        return cls(identifier, message.code, text, file, message.refuses)

    @classmethod
    def of_error(cls, error: Exception, file: str) -> Finding:
        """What reading a file raised. Whatever it was, one file must not end the check of a folder."""
        if isinstance(error, ImageRefused):
            return cls(error.id, error.code, error.text, file)
        if isinstance(error, OSError):
            text = f"it cannot be opened ({error.strerror or error}); check path and rights"
            return cls.of("MM-IO-001", text, file)
        if isinstance(error, MemoryError):
            return cls.of("MM-IO-063", "the memory does not suffice to read it; give more", file)
        return cls.of("MM-IO-064", f"{type(error).__name__}: {error}; please report it", file)

    @classmethod
    def of_note(cls, note: Note, file: str) -> Finding:
        """What a reader noted."""
        return cls.of(note.id, note.text, file)
