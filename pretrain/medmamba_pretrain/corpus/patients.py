"""Which scans belong to one patient: by the name of the file, its folder, a pattern, or what DICOM says.

Splits and sampling by patient need it. A name that DICOM gives is hashed with the store's own salt: equal within the
store, and not the patient's name. That is no anonymisation of the paths.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath

from medmamba.command import CommandError
from medmamba.inference.reading import READABLE_SUFFIXES

_CHANNEL = re.compile(r"_\d{4}$")


def check_rule(rule: str) -> str:
    """``rule`` itself: "file", "folder" or "regex:PATTERN".

    Raises:
        CommandError: it is none of them, or the pattern is no regular expression.
    """
    kind, _, pattern = rule.partition(":")
    if rule in ("file", "folder"):
        return rule
    if kind != "regex" or not pattern:
        raise CommandError(f"patients {rule!r}: known rules are file, folder and regex:PATTERN")
    try:
        re.compile(pattern)
    except re.error as error:
        raise CommandError(f"{pattern!r} is no regular expression ({error})") from error
    return rule


def patient_of(key: str, rule: str) -> str:
    """The patient of a source, by its name in the manifest.

    Args:
        key: label of the input, path in it.
        rule: "file" (the file's name without suffix and nnU-Net's channel), "folder" (the folder that holds it), or
            "regex:PATTERN" (first group, or all, of the first match in the key; without a match as "file").
    """
    path = PurePosixPath(key)
    if rule.startswith("regex:"):
        match = re.search(rule.removeprefix("regex:"), key)
        if match:
            return match[1] if match.re.groups and match[1] else match[0]
    if rule == "folder":
        return path.parent.as_posix()
    name = path.name
    for suffix in sorted(READABLE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return (path.parent / _CHANNEL.sub("", name)).as_posix()


def hashed(name: str, salt: bytes) -> str:
    """A name as it may stand in a manifest."""
    return "dicom-" + hashlib.blake2b(name.encode(), key=salt, digest_size=8).hexdigest()
