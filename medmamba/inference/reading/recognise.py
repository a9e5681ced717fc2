"""What a file is by its first bytes, for the text of a refusal."""

from __future__ import annotations

_STARTS = {
    b"NRRD": "an NRRD file",
    b"ObjectType": "a MetaImage",
    b"NDims": "a MetaImage",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89HDF": "an HDF5 file (MINC 2?)",
    b"CDF": "a netCDF file (MINC?)",
    b"<": "a web page or XML, perhaps of a failed download",
    b"version https://git-lfs": "a placeholder of git-lfs; fetch the file itself",
}


def recognised(head: bytes) -> str:
    """A name for ``head`` (some hundred bytes) with its article, or "no image that we know"."""
    if head[128:132] == b"DICM":
        return "a DICOM file"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "a NIfTI file"
    return next((name for start, name in _STARTS.items() if head.startswith(start)), "no image that we know")
