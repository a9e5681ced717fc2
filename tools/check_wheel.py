"""Check that the installed medmamba has its native library and that the library computes the scan.

    python tools/check_wheel.py

Needs torch and numpy, none of the other dependencies: cibuildwheel runs it on the wheels that it built. Development
only: the package does not import this.
"""

from __future__ import annotations

import sys

import torch

import medmamba_kernels
from medmamba_kernels.backends import native
from medmamba_kernels.testing import self_test


def main() -> int:
    print(f"medmamba_kernels: {', '.join(medmamba_kernels.__path__)}\nlibrary: {native.library_path()}")
    reason = native.unavailable_reason(torch.device("cpu"))
    if reason is not None:
        print(f"check_wheel: {reason}", file=sys.stderr)
        return 1
    error, passed = self_test("native")
    print(f"{native.isa()}: values and gradients {'agree' if passed else 'DISAGREE'}, error of y {error:.1e}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
