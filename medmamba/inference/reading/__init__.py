"""Checked reading of images: a damaged or unsuitable file is refused with a reason, never read as something else.

What a reader of SimpleITK or nibabel takes without a word (a NIfTI cut in half, a flipped byte in a gzip, a DICOM
series with a hole, the real part of a complex image) is refused here. What is only odd comes with a note.
"""

from .image import Header, Image, ImageRefused, Note
from .messages import MESSAGES
from .read import READABLE_SUFFIXES, read_dicom_folder, read_image

__all__ = [
    "MESSAGES",
    "READABLE_SUFFIXES",
    "Header",
    "Image",
    "ImageRefused",
    "Note",
    "read_dicom_folder",
    "read_image",
]
