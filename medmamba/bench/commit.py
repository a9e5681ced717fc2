"""The commit that a measurement belongs to."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(file: Path) -> str:
    """Short hash of the checkout that holds ``file``, with ``-dirty`` when tracked files are changed.

    Empty for a file that is in no checkout or that git does not track, such as a package installed into an environment
    that lies inside somebody's checkout.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.resolve().name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
