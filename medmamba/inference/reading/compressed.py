"""Decompression to the very end, where the checksum is."""

from __future__ import annotations

import bz2
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from .messages import refused

GZIP_MAGIC = b"\x1f\x8b"
#: Deflate needs at least one byte for this many.
MOST_INFLATION = 1032
_CHUNK = 1 << 20
_PIECE = 16 << 20  # the most to decompress at once, against a megabyte that becomes a gigabyte


@dataclass(frozen=True)
class Inflated:
    """What came out of a compressed stream.

    Attributes:
        content: the bytes; empty when only their number was asked for.
        length: their number.
        trailing: bytes in the file after the end of the stream; 0 where they are zeros, as on tapes.
    """

    content: bytearray
    length: int
    trailing: int


class _Decoder(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Deflate:
    """zlib's decoder with the interface of bz2's: it keeps the input that did not fit into ``max_length``."""

    def __init__(self, window: int) -> None:
        self._decoder = zlib.decompressobj(window)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _decoder(compression: str) -> Any:
    # zlib's names for "gzip with CRC-32" and "zlib with Adler-32" are 31 and 15.
    return bz2.BZ2Decompressor() if compression == "bzip2" else _Deflate({"gzip": 31, "zlib": 15}[compression])


def inflate(path: Path, compression: str, *, offset: int = 0, limit: int, keep: bool = True) -> Inflated:
    """Decompress all streams of a file, one after the other, and check length and checksums.

    Args:
        compression: "gzip", "zlib" or "bzip2".
        offset: first byte of the data.
        limit: the most bytes to accept, against files made to fill the memory.
        keep: False to count the bytes only.

    Raises:
        ImageRefused: "truncated", "checksum" (a changed byte), or "oversized".
    """
    content = bytearray()
    length = 0
    with path.open("rb") as stream:
        stream.seek(offset)
        rest = stream.read(_CHUNK)
        while True:
            decoder: _Decoder = _decoder(compression)
            while not decoder.eof:
                try:
                    piece = decoder.decompress(rest, _PIECE)
                except (zlib.error, OSError, ValueError) as error:
                    raise refused(
                        "MM-IO-005",
                        f"the compressed data are damaged after {length} bytes ({error}); copy or download it again",
                    ) from error
                length += len(piece)
                if length > limit:
                    raise refused("MM-IO-006", f"it holds more than the {limit} bytes that its header can mean")
                if keep:
                    content += piece
                if decoder.eof:
                    break
                # A full piece may have left output behind, which needs no further input.
                rest = b"" if len(piece) == _PIECE else stream.read(_CHUNK)
                if not rest and not piece:
                    raise refused(
                        "MM-IO-004",
                        f"the compressed data end in the middle, after {length} bytes; copy or download it again",
                    )
            rest = decoder.unused_data or stream.read(_CHUNK)
            if compression != "gzip" or not rest.startswith(GZIP_MAGIC):
                return Inflated(content, length, _unlike_padding(rest, stream))


def _unlike_padding(rest: bytes, stream: IO[bytes]) -> int:
    """Number of bytes until the end of the file; 0 when all are zero."""
    count, found = 0, False
    while rest:
        count, found = count + len(rest), found or bool(rest.strip(b"\0"))
        rest = stream.read(_CHUNK)
    return count if found else 0
