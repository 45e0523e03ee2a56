"""Chance that two languages draw alike: Philox4x32-10 (Salmon et al. 2011), as docs/chance.md defines it.

Needs numpy's core alone: `numpy.random` would cost a device 6 MiB of imports.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_CHUNK_BLOCKS = 1 << 13  # so that the rounds stay in the processor's cache


def philox(counters: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of counters of shape (blocks, 4), in the same shape."""
    a, b, c, d = (counters[:, word].astype(np.uint64) for word in range(4))
    for number in range(10):
        left, right = (np.uint64((word + number * step) & 0xFFFFFFFF) for word, step in zip(key, _KEY_STEPS, strict=True))
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> _32) ^ b ^ left, second & _LOW, (first >> _32) ^ d ^ right, first & _LOW
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


class Stream:
    """Draws that a text alone decides, such as "seed/stage/round/device/purpose". Every draw starts at a fresh block."""

    def __init__(self, text: str) -> None:
        words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u4")
        self._key, self._nonce = (int(words[0]), int(words[1])), words[2:]
        self._block = 0

    def words(self, count: int) -> Words:
        """`count` words of 32 bits."""
        blocks = -(-count // 4)
        drawn = np.empty((blocks, 4), np.uint32)
        for start in range(0, blocks, _CHUNK_BLOCKS):
            chunk = drawn[start : start + _CHUNK_BLOCKS]
            numbers = np.arange(len(chunk), dtype=np.uint64) + np.uint64(self._block + start)
            chunk[:, 0], chunk[:, 1], chunk[:, 2:] = numbers & _LOW, numbers >> _32, self._nonce
            chunk[:] = philox(chunk, self._key)
        self._block += blocks
        return drawn.reshape(-1)[:count]

    def uniform32(self, count: int) -> NDArray[np.float32]:
        """Multiples of 2^-24 on [0, 1)."""
        return (self.words(count) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)

    def uniform64(self, count: int) -> NDArray[np.float64]:
        """Multiples of 2^-53 on [0, 1)."""
        pairs = self.words(2 * count).reshape(-1, 2)
        high, low = pairs[:, 0] >> np.uint32(5), pairs[:, 1] >> np.uint32(6)
        return (high * 2.0**26 + low) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float32]:
        """Box-Muller in float64, then rounded: to the bit but for the logarithm, sine and cosine of the platform."""
        pairs = self.uniform64(count + count % 2).reshape(-1, 2)
        radius, angle = np.sqrt(-2 * np.log(1 - pairs[:, 0])), 2 * np.pi * pairs[:, 1]
        values = np.empty(pairs.shape, np.float32)
        values[:, 0], values[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
        return values.reshape(-1)[:count]

    def below(self, bounds: NDArray[Any]) -> NDArray[np.int64]:
        """For each bound, from 1 to 2^32 - 1, an integer from 0 to the bound less one, without bias."""
        bounds = bounds.astype(np.uint64)
        values = np.empty(len(bounds), np.int64)
        places = np.arange(len(bounds))
        while places.size:
            left = bounds[places]
            products = self.words(len(left)) * left
            accepted = (products & _LOW) >= (np.uint64(2**32) - left) % left
            values[places[accepted]] = products[accepted] >> _32
            places = places[~accepted]
        return values

    def shuffled(self, count: int) -> list[int]:
        """The numbers below `count` in the order of Fisher and Yates, from the last place down."""
        order = list(range(count))
        others = self.below(np.arange(count, 1, -1)).tolist()
        for place, other in zip(range(count - 1, 0, -1), others, strict=True):
            order[place], order[other] = order[other], order[place]
        return order
