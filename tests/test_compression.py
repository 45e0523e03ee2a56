"""zstd where it is there: round trips, bounds, damaged frames, and doing without."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.encoding.compression import available_compressions, compress, compress_file, decompress, decompress_file
from lamina.errors import TensorFileError, TooLargeError

TEXT = b"the same again and again " * 10_000


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=5000), compression=st.sampled_from(["none", "zstd"]))
def test_what_was_compressed_comes_back(data: bytes, compression) -> None:
    assert decompress(compress(data, compression), compression, len(data)) == data
    assert compress(data, compression) == compress(data, compression)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_files_go_through_in_pieces(tmp_path: Path, compression) -> None:
    source, packed, back = tmp_path / "source", tmp_path / "packed", tmp_path / "back"
    source.write_bytes(TEXT)
    compress_file(source, packed, compression)
    decompress_file(packed, back, compression, len(TEXT))
    assert back.read_bytes() == TEXT
    assert decompress(packed.read_bytes(), compression, len(TEXT)) == TEXT
    assert (packed.stat().st_size < len(TEXT) / 50) == (compression == "zstd")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_nothing_becomes_larger_than_its_bound(tmp_path: Path, compression) -> None:
    data = compress(TEXT, compression)
    with pytest.raises(TooLargeError, match=f"{len(TEXT) - 1}"):
        decompress(data, compression, len(TEXT) - 1)


def test_a_bomb_is_refused_before_it_is_made() -> None:
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 30))
    assert len(bomb) < 1 << 20
    with pytest.raises(TooLargeError, match="becomes 1073741824 bytes, at most 1000 are legal"):
        decompress(bomb, "zstd", 1000)


def test_a_bomb_that_lies_about_its_size_is_refused() -> None:
    """The frame of a million zeros says that it holds 1,000."""
    honest = zstandard.ZstdCompressor(level=3).compress(bytes(1_000_000))
    frame = zstandard.get_frame_parameters(honest)
    assert frame.content_size == 1_000_000 and honest[4] >> 6 == 2  # four bytes of size follow the descriptor
    at = honest.index((1_000_000).to_bytes(4, "little"))
    liar = honest[:at] + (1000).to_bytes(4, "little") + honest[at + 4 :]
    with pytest.raises((TooLargeError, TensorFileError)):
        decompress(liar, "zstd", 1000)


def test_a_frame_without_its_size_is_refused() -> None:
    data = zstandard.ZstdCompressor(write_content_size=False).compress(TEXT)
    with pytest.raises(TensorFileError, match="does not say how large its content is"):
        decompress(data, "zstd", len(TEXT))


def test_a_frame_that_needs_a_large_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=19, enable_ldm=True)
    data = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(64 << 20))
    assert zstandard.get_frame_parameters(data).window_size > 8 << 20
    with pytest.raises(TensorFileError, match="window"):
        decompress(data, "zstd", 64 << 20)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_frame_gives_an_error_or_bounded_bytes(data: st.DataObject) -> None:
    whole = compress(TEXT, "zstd")
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        with pytest.raises((TensorFileError, TooLargeError)):
            decompress(whole[:at], "zstd", len(TEXT))
        return
    broken = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    with suppress(TensorFileError, TooLargeError):
        assert len(decompress(broken, "zstd", len(TEXT))) <= len(TEXT)


def test_without_the_package_there_is_no_compression_and_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["zstandard"] = None  # Python's own way to say: not importable
from lamina.encoding.compression import available_compressions, compress
from lamina.errors import ConfigError
try:
    compress(b"x", "zstd")
except ConfigError as error:
    print(available_compressions(), error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "('none',) zstd is not installed here: pip install 'lamina[zstd]'", done.stderr
    assert available_compressions() == ("none", "zstd")
