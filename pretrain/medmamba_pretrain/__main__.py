"""``python -m medmamba_pretrain ...`` is ``medmamba pretrain ...``, for torchrun."""

from __future__ import annotations

import sys

from medmamba.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
