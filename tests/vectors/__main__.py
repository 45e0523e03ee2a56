"""Writes the vectors of chance: `python -m tests.vectors [FOLDER]`."""

import json
import sys
from pathlib import Path

import numpy as np

from lamina.encoding.rng import Stream
from tests.vectors.load import FOLDER

TEXTS = "7/0/0/alice/order", "7/2/31/phone-3/rounding", ""


def write(folder: Path) -> None:
    """Writes chance.json, the same bytes each time."""
    (folder / "chance.json").write_text(json.dumps([_of(text) for text in TEXTS], indent=1) + "\n")


def _of(text: str) -> dict[str, object]:
    return {
        "text": text,
        "words": [f"{word:08x}" for word in Stream(text).words(9)],
        "uniform32": Stream(text).uniform32(5).astype("<f4").tobytes().hex(),
        "uniform64": Stream(text).uniform64(5).astype("<f8").tobytes().hex(),
        "normal": [round(float(value), 6) for value in Stream(text).normal(7)],
        "below 3 * 2^30": Stream(text).below(np.full(9, 3 << 30)).tolist(),
        "shuffled": Stream(text).shuffled(17),
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
