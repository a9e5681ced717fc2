"""Decompression to the very end, where the checksum is."""

from __future__ import annotations

import zlib
from pathlib import Path

from .image import ImageRefused

GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20
_GZIP, _ZLIB = 31, 15  # zlib's names for "gzip with CRC-32" and "zlib with Adler-32"


def inflate_gzip(path: Path, *, offset: int = 0, limit: int) -> bytearray:
    """Content of a gzip file (all its members) from byte ``offset`` on; see :func:`_inflate`."""
    return _inflate(path, offset, limit, _GZIP)


def inflate_zlib(path: Path, *, offset: int = 0, limit: int) -> bytearray:
    """Content of a zlib stream from byte ``offset`` of a file on; see :func:`_inflate`."""
    return _inflate(path, offset, limit, _ZLIB)


def _inflate(path: Path, offset: int, limit: int, window: int) -> bytearray:
    """Decompress and check length and checksum.

    Args:
        limit: the most bytes to accept, against files made to fill the memory.

    Raises:
        ImageRefused: "truncated", "checksum" (a changed byte), or "oversized".
    """
    content = bytearray()
    with path.open("rb") as stream:
        stream.seek(offset)
        decoder = zlib.decompressobj(window)
        rest = b""
        while chunk := rest or stream.read(_CHUNK):
            try:
                content += decoder.decompress(chunk)
            except zlib.error as error:
                raise ImageRefused(
                    "checksum",
                    f"the compressed data are damaged after {len(content)} bytes ({error}); copy or download it again",
                ) from error
            if len(content) > limit:
                raise ImageRefused("oversized", f"it holds more than the {limit} bytes that its header can mean")
            rest = decoder.unused_data
            if decoder.eof:
                rest = rest or stream.read(_CHUNK)
                if not rest.startswith(GZIP_MAGIC):  # the end; padding after it is common on tapes
                    return content
                decoder = zlib.decompressobj(window)
    raise ImageRefused(
        "truncated", f"the compressed data end in the middle, after {len(content)} bytes; copy or download it again"
    )
