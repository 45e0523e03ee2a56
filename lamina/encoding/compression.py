"""Compressing what travels: zstd, where both sides have it.

The package `zstandard` is imported only when it is used; without it `available_compressions()` is `("none",)`, and a device
that says so is never sent anything compressed. Nothing that arrives may become larger than its reader expects: a frame
must state its size, which is refused above the bound before a byte of it is made, and what comes out is counted as well.
"""

import importlib.util
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

from lamina.errors import ConfigError, TensorFileError, TooLargeError

Compression = Literal["none", "zstd"]

_PIECE_BYTES = 1 << 17
_FRAME_HEADER_BYTES = 18  # the longest that the format knows
_LEVEL = 3
_MAX_WINDOW_BYTES = 8 << 20
"""What a reader must keep in memory at most; frames of levels up to 19 need no more."""


def available_compressions() -> tuple[Compression, ...]:
    """What this process can write and read."""
    return ("none", "zstd") if importlib.util.find_spec("zstandard") else ("none",)


def compress(data: bytes, compression: Compression) -> bytes:
    """The same data, version of the library and compression give the same bytes. Raises ConfigError without the library."""
    if compression == "none":
        return data
    return bytes(_zstandard().ZstdCompressor(level=_LEVEL).compress(data))


def compress_file(source: Path, target: Path, compression: Compression) -> None:
    """Writes `target`, piece by piece. Raises ConfigError without the library."""
    with source.open("rb") as reading, target.open("wb") as writing:
        if compression == "none":
            while piece := reading.read(_PIECE_BYTES):
                writing.write(piece)
        else:
            compressor = _zstandard().ZstdCompressor(level=_LEVEL)
            compressor.copy_stream(reading, writing, size=source.stat().st_size)


def decompress(data: bytes, compression: Compression, max_bytes: int) -> bytes:
    """Raises TooLargeError beyond `max_bytes`, TensorFileError for damaged data, ConfigError without the library."""
    target = BytesIO()
    decompress_stream(BytesIO(data), target.write, compression, max_bytes)
    return target.getvalue()


def decompress_file(source: Path, target: Path, compression: Compression, max_bytes: int) -> None:
    """As `decompress`, piece by piece; what was written before an error is left for the caller to delete."""
    with source.open("rb") as reading, target.open("wb") as writing:
        decompress_stream(reading, writing.write, compression, max_bytes)


def decompress_stream(source: IO[bytes], write: Callable[[bytes], object], compression: Compression, max_bytes: int) -> None:
    """As `decompress`, from a file that can seek, to whatever takes the pieces."""
    if compression == "none":
        reader: IO[bytes] | Any = source
        promised = None
    else:
        reader, promised = _open_frame(source, max_bytes)
    written = 0
    try:
        while piece := reader.read(_PIECE_BYTES):
            written += len(piece)
            if written > max_bytes:
                raise TooLargeError(f"the body becomes larger than the {max_bytes} bytes that are legal here")
            write(piece)
    except Exception as error:
        if compression != "none" and isinstance(error, _zstandard().ZstdError):
            raise TensorFileError(f"this is no valid zstd frame: {error}") from error
        raise
    if promised is not None and written != promised:
        raise TensorFileError(f"the zstd frame ends after {written} of its {promised} bytes; send or fetch it again")


def _open_frame(source: IO[bytes], max_bytes: int) -> tuple[Any, int]:
    """A reader of a frame's content, and the size that the frame promises."""
    zstandard = _zstandard()
    start = source.read(_FRAME_HEADER_BYTES)
    source.seek(0)
    try:
        frame = zstandard.get_frame_parameters(start)
    except zstandard.ZstdError as error:
        raise TensorFileError(f"this is no valid zstd frame: {error}") from error
    if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise TensorFileError("the zstd frame does not say how large its content is; compress it with the content size")
    if frame.content_size > max_bytes:
        raise TooLargeError(f"the body becomes {frame.content_size} bytes, at most {max_bytes} are legal here")
    if frame.window_size > _MAX_WINDOW_BYTES:
        raise TensorFileError(f"the zstd frame needs a window of {frame.window_size} bytes, above {_MAX_WINDOW_BYTES}")
    reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(source, read_size=_PIECE_BYTES)
    return reader, frame.content_size


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError("zstd is not installed here: pip install 'lamina[zstd]'") from error
    return zstandard
