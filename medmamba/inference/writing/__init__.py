"""Verified writing of segmentations: a file has its final name only if it reads back as what was meant."""

from .names import NAMES_ECODES, names_of
from .segmentation import WRITABLE_SUFFIXES, WriteFailed, suffix_of, verify_segmentation, write_segmentation

__all__ = [
    "NAMES_ECODES",
    "WRITABLE_SUFFIXES",
    "WriteFailed",
    "names_of",
    "suffix_of",
    "verify_segmentation",
    "write_segmentation",
]
