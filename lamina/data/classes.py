"""From labels to class indices, in an order that all devices share.

A label of a table or a folder is a text. Where some of them are numbers, labels are class indices, and every other label is a
fault. They are names where names were given, or where none is a number.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.items import as_int
from lamina.data.tables import read_text
from lamina.errors import DataError

LONGEST_NAME = 100
_NO_LABEL = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "nat", "null", "nil", "none", "?", "-", "--", "."})
"""What programs and people write into a cell that has no value; with --classes it may be a name all the same."""
_WAY_OUT = (
    "List them in the order that all devices share: --classes FILE (one a line) or --classes A,B,..; or take them from a "
    "file that was packed with them: --card OTHER.npz"
)


class Classes:
    """Maps a label of the source to an index in [0, count).

    `names` is None where labels are indices already. `strange` says of some labels why they are no class. Where `mismatch` is
    not empty, it says why the names of the source cannot be put in order: nothing is packed then.
    """

    def __init__(
        self,
        count: int,
        names: tuple[str, ...] | None,
        strange: Mapping[str, str] | None = None,
        mismatch: str = "",
        takes_indices: bool = True,
    ) -> None:
        self.count, self.names, self.mismatch = count, names, mismatch
        self._strange, self._takes_indices = strange or {}, takes_indices
        self._index = {name: index for index, name in enumerate(names or ())}

    def index(self, label: Any) -> int:
        """Raises DataError for a label that is no class."""
        if isinstance(label, str):
            label = label.strip()
            if label in self._strange:
                raise DataError(self._strange[label])
            if label in self._index:
                return self._index[label]
        if label is None or label == "":
            raise DataError(f"has no label; expected one of {self.count} classes")
        if isinstance(label, str) and label.casefold() in _NO_LABEL:
            raise DataError(f"has no label but {label!r}; expected one of {self.count} classes. If it is a name: --classes")
        if isinstance(label, str) and self.names is not None and not (self._takes_indices and as_int(label) is not None):
            raise DataError(f"label {_short(label)} is not among the {len(self._index)} classes: {listed(self.names)}")
        found = as_int(label)
        if found is None:
            remedy = "; class names need --classes" if isinstance(label, str) else ""
            plain = label.item() if hasattr(label, "item") and np.size(label) == 1 else label
            raise DataError(f"label {_short(plain)} is not an integer; expected one in 0..{self.count - 1}{remedy}")
        if not 0 <= found < self.count:
            raise DataError(f"label {_short(found)} is outside of 0..{self.count - 1}")
        return found

    def shown(self, index: int) -> str:
        return f"{index} ({self.names[index]})" if self.names and index < len(self.names) else str(index)


def choose_classes(count: int, labels: Mapping[str, int] | None, names: tuple[str, ...] | None) -> Classes:
    """The classes of a model with `count` of them.

    `labels` has how often each text is a label of the source; None where its labels are no texts. `names` are those that were
    given, in the order of their indices. Without them, the names of the source are taken, sorted, if there is one for every
    class of the model: with fewer, two devices that hold different classes would give one index to two things.
    """
    if names is not None:
        _check_names(names, count)
        texts = [label for label in labels or () if not is_no_label(label)]
        is_mixed = any(as_int(label) is None for label in texts) or any(_is_number(name) for name in names)
        return Classes(count, names, takes_indices=not is_mixed)
    words = {label: times for label, times in (labels or {}).items() if not is_no_label(label) and not _is_number(label)}
    numbers = {label: times for label, times in (labels or {}).items() if _is_number(label)}
    if not words or sum(numbers.values()) >= sum(words.values()):
        return Classes(count, None)
    strange = {label: f"label {_short(label)} is a number among names; if it is a name too: --classes" for label in numbers}
    strange |= _strange_names(words)
    found = sorted(set(words) - set(strange))
    mismatch = ""
    if len(found) > count:
        mismatch = f"the source has {len(found)} class names ({listed(found)}), the model {count} classes. {_WAY_OUT}"
        often = sorted(found, key=lambda name: (-words[name], name))
        for name in often[count:]:
            strange[name] = (
                f"label {_short(name)} is one name too many for {count} classes; the others are at least as frequent"
            )
        found = sorted(often[:count])
    elif len(found) < count:
        mismatch = (
            f"the source has {len(found)} class names ({listed(found)}), the model {count} classes: their order cannot "
            f"be known, and it must be the same on every device. {_WAY_OUT}"
        )
    return Classes(count, tuple(found), strange, mismatch)


def is_no_label(label: str) -> bool:
    return label.strip().casefold() in _NO_LABEL


def read_names(given: str | Path) -> tuple[str, ...]:
    """The names in a file, one a line, or those that are listed with commas. Raises DataError."""
    path = Path(given)
    if path.is_file():
        return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if isinstance(given, str) and "," in given:
        return tuple(name.strip() for name in given.split(","))
    raise DataError(f"--classes {given} does not exist; it takes a file with a name on each line, or names as cat,dog")


def listed(names: Iterable[str], most: int = 6) -> str:
    names = [name if len(name) <= 40 else f"{name[:40]}..." for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_names(names: tuple[str, ...], count: int) -> None:
    """Raises DataError for names that cannot be those of `count` classes."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"the class {twice!r} is named twice; each class has one line, and one name")
    if len(names) != count:
        raise DataError(f"{len(names)} classes are named ({listed(names)}), the model has {count}")
    for name in names:
        if fault := name_fault(name):
            raise DataError(f"class name {_short(name)} {fault}")


def name_fault(name: str) -> str:
    """Why a text can be no class name; empty if it can."""
    if not name or name != name.strip():
        return "is empty or has blanks around it"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters, a class name has at most {LONGEST_NAME}"
    return "" if name.isprintable() else "has characters that cannot be printed"


def _strange_names(words: Mapping[str, int]) -> dict[str, str]:
    """Of the words that cannot be names: why. Those that differ from another one in case or blanks alone are misspelled."""
    strange = {word: f"label {_short(word)} {fault}" for word in words if (fault := name_fault(word))}
    spellings: dict[str, list[str]] = {}
    for word in words:
        key = " ".join(unicodedata.normalize("NFKC", word).casefold().split())
        spellings.setdefault(key, []).append(word)
    for same in spellings.values():
        usual = min(same, key=lambda word: (-words[word], word))
        why = f"is {_short(usual)} in {words[usual]} other examples: write it in one way, or give --classes"
        strange |= {word: f"label {_short(word)} {why}" for word in same if word != usual}
    return strange


def _is_number(label: str) -> bool:
    """Whether the text is a number, an integer or not; what stands for no value is none."""
    if is_no_label(label):
        return False
    try:
        float(label.replace(",", "."))  # a decimal comma makes no name of it
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
