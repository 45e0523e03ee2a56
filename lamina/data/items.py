"""What a source gives: examples that name their values and do not hold them yet, where that can be helped."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lamina.data.faults import Faults

Array = NDArray[Any]
_INTEGER = re.compile(r"[+-]?\d{1,400}(\.0*)?", re.ASCII)


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
    def labels(self) -> Counter[str] | None:
        """How often each label stands there, without blanks around it; None where labels are no texts, or unknown."""
        ...

    def count(self) -> int | None:
        """How many items there will be, if that is known."""
        ...

    def items(self, faults: Faults) -> Iterator[Item]:
        """Every example once. Adds a fault for one that cannot be formed."""
        ...


def as_int(value: Any) -> int | None:
    """The integer that `value` is: a number of numpy, a float such as 3.0 or a text such as "3" or "3.0"; otherwise None."""
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _INTEGER.fullmatch(text) else None
    if isinstance(value, bool | np.bool_):
        return None
    try:
        number = float(np.asarray(value).item())
        return int(number) if number.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None
