"""What a source gives: examples that name their values and do not hold them yet, where that can be helped."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lamina.data.faults import Faults

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Item:
    """One example before conversion.

    `values` has for each modality a `Path` (a file), a `str` (a text), an array or an image of pillow. `label` is a class name
    or an index. Items of one `group` go into the same split. Two items of one `key` are the same example.
    """

    name: str
    values: dict[str, Any]
    label: Any = None
    split: str | None = None
    group: str | None = None
    key: str | None = None


class Source(Protocol):
    """A data set in the form in which its owner has it."""

    @property
    def words(self) -> str:
        """What it is, for people: `class folders in photos`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Sorted names, where labels are names and not indices."""
        ...

    def count(self) -> int | None:
        """How many items there will be, if that is known."""
        ...

    def items(self, faults: Faults) -> Iterator[Item]:
        """Every example once. Adds a fault for one that cannot be formed."""
        ...


def sorted_names(labels: set[str]) -> tuple[str, ...] | None:
    """Class names in order; None if all labels are integers, which are indices: sorted as names, 10 would come before 2."""
    return None if all(as_int(label) is not None for label in labels) else tuple(sorted(labels))


def as_int(value: Any) -> int | None:
    """The integer that `value` is, be it a number of numpy, a float such as 3.0 or a text such as "3"; otherwise None."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else None
    if isinstance(value, bool | np.bool_):
        return None
    try:
        number = float(np.asarray(value).item())
        return int(number) if number.is_integer() else None
    except (TypeError, ValueError):
        return None
