"""From labels to class indices, in an order that all devices share."""

from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.items import as_int
from lamina.errors import DataError


class Classes:
    """Maps a label of the source to an index in [0, count). `names` is None where labels are indices already."""

    def __init__(self, count: int, names: tuple[str, ...] | None) -> None:
        self.count, self.names = count, names
        self._index = {name: index for index, name in enumerate(names or ())}

    def index(self, label: Any) -> int:
        """Raises DataError for a label that is no class."""
        if label is None or label == "":
            raise DataError(f"has no label; expected one of {self.count} classes")
        if isinstance(label, str) and self.names is not None:
            if label not in self._index:
                raise DataError(f"label {label!r} is not among the {len(self._index)} classes: {_listed(self.names)}")
            return self._index[label]
        found = as_int(label)
        if found is None:
            remedy = "; class names need --classes" if isinstance(label, str) else ""
            plain = label.item() if hasattr(label, "item") and np.size(label) == 1 else label
            raise DataError(f"label {plain!r} is not an integer; expected one in 0..{self.count - 1}{remedy}")
        if not 0 <= found < self.count:
            raise DataError(f"label {found} is outside of 0..{self.count - 1}")
        return found

    def shown(self, index: int) -> str:
        return f"{index} ({self.names[index]})" if self.names and index < len(self.names) else str(index)


def choose_classes(count: int, found: tuple[str, ...] | None, file: Path | None) -> Classes:
    """The classes of a model with `count` of them: those of `file`, or else the names that the source has, sorted.

    Names are sorted only if the source has one for every class of the model. With fewer, two devices that hold different
    classes would give one index to two things. Raises DataError.
    """
    if file is not None:
        return Classes(count, _read_names(file, count))
    if found is None:
        return Classes(count, None)
    if len(found) > count:
        raise DataError(f"the source has {len(found)} class names, the model {count} classes: {_listed(found)}")
    if len(found) < count:
        raise DataError(
            f"the source has {len(found)} class names ({_listed(found)}), the model {count} classes: their order cannot "
            f"be known, and it must be the same on every device. List all {count} in a file, one a line: --classes FILE"
        )
    return Classes(count, found)


def _read_names(file: Path, count: int) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    except FileNotFoundError as error:
        raise DataError(f"--classes {file} does not exist") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--classes {file} is not UTF-8 text") from error
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{file} names the class {twice!r} twice")
    if len(names) != count:
        raise DataError(f"{file} names {len(names)} classes, the model has {count}")
    return names


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
