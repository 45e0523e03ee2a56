"""Chance that two languages draw alike."""

from pathlib import Path

import numpy as np
import pytest

from lamina.encoding.rng import Stream, philox
from tests.vectors.__main__ import write
from tests.vectors.load import FOLDER, load


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ("00000000" * 4, "00000000" * 2, "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe0994fdcceb5001e42024126ea1"),
    ],
)
def test_published_answers_of_random123(counter: str, key: str, block: str) -> None:
    counters = np.frombuffer(bytes.fromhex(counter), ">u4").astype(np.uint32).reshape(1, 4)
    words = philox(counters, (int(key[:8], 16), int(key[8:], 16)))
    assert words.astype(">u4").tobytes().hex() == block


def test_the_stored_vectors_are_what_the_code_draws(tmp_path: Path) -> None:
    write(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


@pytest.mark.parametrize("number", range(3))
def test_normal_is_box_muller_within_the_stated_bound(number: int) -> None:
    vector = load("chance")[number]
    assert np.allclose(Stream(vector["text"]).normal(7), vector["normal"], rtol=1e-6, atol=1e-6)
    values = Stream(f"many {number}").normal(100_001)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_a_long_draw_is_the_blocks_in_their_order() -> None:
    stream, long = Stream("a"), Stream("a").words(100_000)
    assert np.array_equal(long, np.concatenate([stream.words(4 * count) for count in (1, 10_000, 14_999)]))


def test_bounded_integers_have_no_bias_and_a_shuffle_is_a_permutation() -> None:
    counts = np.bincount(Stream("b").below(np.full(30_000, 3 << 30)) >> 30, minlength=3)
    assert counts.sum() == 30_000
    assert np.abs(counts - 10_000).max() < 500
    assert sorted(Stream("c").shuffled(1000)) == list(range(1000))
    assert Stream("c").shuffled(0) == [] and Stream("c").shuffled(1) == [0]
