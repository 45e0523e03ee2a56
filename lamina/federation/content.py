"""What an update holds: decoded values, however they travelled."""

from collections.abc import Sequence
from hashlib import sha256
from math import fsum, inf, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lamina.encoding.tensors import decode_one_by_one
from lamina.errors import TensorFileError
from lamina.plans.segments import TensorSpec

MAX_DIFFERENCE = 1e4
"""No value of a difference may be larger, nor one times the server's learning rate. Weights are of the order of 1, so a
training that moves one so far within a round has diverged: no honest device comes near."""


class Content(NamedTuple):
    """The decoded values of an update: a sha256 over them, the same for every encoding of them, and their L2 norm."""

    sha256: str
    norm: float


def check_content(path: str, specs: list[TensorSpec], max_difference: float = MAX_DIFFERENCE) -> Content:
    """Reads an update with one tensor resident at a time. Raises TensorFileError."""
    content = sha256()
    squares = []
    for name, value in decode_one_by_one(path, specs):
        largest = float(np.abs(value).max(initial=0.0))
        if largest > max_difference:
            raise TensorFileError(f"tensor {name!r} holds {largest:g}, above {max_difference:g}: the training diverged")
        content.update(name.encode() + b"\0")
        content.update(value.tobytes())
        squares.append(float(np.square(value, dtype=np.float64).sum()))
    return Content(content.hexdigest(), sqrt(fsum(squares)))


def check_accepted(path: Path, content_sha256: str, specs: Sequence[TensorSpec]) -> None:
    """Raises TensorFileError unless the file of an accepted update still holds the very values that were accepted."""
    if check_content(str(path), list(specs), inf).sha256 != content_sha256:
        raise TensorFileError(f"the accepted update {path.name} is damaged on the coordinator's disk: it holds other values")
