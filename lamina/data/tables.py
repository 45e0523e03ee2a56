"""Text files as people save them: in UTF-8 or UTF-16, and tables with one of four separators.

encoding     as the byte order mark says; without one it is UTF-8
separator    `,` `;` tab or `|`: the one that makes most of the first line. A first line `sep=;`, as spreadsheets write it,
             says it
"""

import csv
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamina.errors import DataError

LARGEST_TEXT_BYTES = 64 << 20
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SUFFIXES = (".csv", ".tsv")
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_SAID = re.compile(r"\s*sep=(.)\s*")
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Form:
    """How a table is written. `has_said` tells that its first line only says the separator."""

    encoding: str
    separator: str
    has_said: bool = False


def encoding_of(path: Path) -> str:
    """Raises DataError for a file that is no text."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise DataError(f"{path.name} has zero bytes, so it is no text, or UTF-16 without its mark; save it as UTF-8")
    return "utf-8-sig"


def read_text(path: Path) -> str:
    """All of a text file. Raises DataError that names the line of the first byte that is no text."""
    size = path.stat().st_size
    if size > LARGEST_TEXT_BYTES:
        raise DataError(f"{path.name} has {size:,} bytes; a text has at most {LARGEST_TEXT_BYTES:,}")
    try:
        return path.read_text(encoding_of(path))
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error


def find_form(path: Path, known: Collection[str] = ()) -> Form:
    """How a table is written: the separator that gives its first line most of the `known` names, then numbers alone, then most
    cells; in doubt that of its suffix. Raises DataError."""
    encoding = encoding_of(path)
    try:
        with path.open(encoding=encoding, newline="") as file:
            first = file.readline()
            said = _SAID.fullmatch(first)
            if said and said[1] in SEPARATORS:
                return Form(encoding, said[1], has_said=True)
            file.seek(0)
            usual = "\t" if path.suffix.lower() == ".tsv" else ","
            best, most = usual, (-1, -1, -1, -1)
            for separator in (usual, *(s for s in SEPARATORS if s != usual)):
                file.seek(0)
                cells = [cell.strip() for cell in next(csv.reader(file, delimiter=separator), [])]
                named = sum(cell in known for cell in cells)
                # Not the number of numbers: with decimal commas, commas would find more of them.
                is_numbers = all(_number(cell, separator) is not None for cell in cells)
                is_clean = not any(mark in cell for cell in cells for mark in SEPARATORS if mark not in (",", separator))
                if (score := (named, int(is_numbers), int(is_clean), len(cells))) > most:
                    best, most = separator, score
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except csv.Error as error:
        raise DataError(f"{path.name} line 1: {error}") from error
    return Form(encoding, best)


def table_rows(path: Path, form: Form) -> Iterator[tuple[int, list[str]]]:
    """(line where it begins, cells) of each row that is not empty, the header too. Raises DataError that names the line."""
    line = 1
    try:
        with path.open(encoding=form.encoding, newline="") as file:
            if form.has_said:
                file.readline()
                line = 2
            reader = csv.reader(file, delimiter=form.separator)
            before = line - 1
            for row in reader:
                begin, line = line, before + reader.line_num + 1
                if row:
                    yield begin, row
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except csv.Error as error:
        raise DataError(f"{path.name} line {line}: {error}") from error


def read_numbers(path: Path) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """(rows, columns) of a table of numbers, and the names of its columns if its first line has them. Raises DataError."""
    size = path.stat().st_size
    if size > LARGEST_TEXT_BYTES:
        raise DataError(f"has {size:,} bytes; a table of numbers has at most {LARGEST_TEXT_BYTES:,}")
    form = find_form(path)
    names: tuple[str, ...] = ()
    rows: list[list[float]] = []
    marks: set[str] = set()  # what stands before decimals
    for line, row in table_rows(path, form):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        numbers = [_number(cell, form.separator) for cell in cells]
        if not rows and not names and all(number is None for number in numbers):
            names = tuple(cells)
            continue
        for cell, number in zip(cells, numbers, strict=True):
            if number is None:
                raise DataError(
                    f"line {line} is not numbers: {cell[:40]!r}; cells are separated by {SEPARATORS[form.separator]}"
                )
            marks |= {mark for mark in ".," if mark in cell}
        if len(marks) > 1:
            raise DataError(
                f"line {line} has a number with a comma, others have points; write all with points, and no thousands"
            )
        width = len(rows[0]) if rows else len(names) or len(cells)
        if len(cells) != width:
            raise DataError(f"line {line} has {len(cells)} numbers, the lines before it {width}")
        rows.append([number for number in numbers if number is not None])
    if not rows:
        raise DataError("has no rows of numbers")
    return np.array(rows), names


def twice(names: Sequence[str]) -> str | None:
    """The first name that stands there twice."""
    return next((name for place, name in enumerate(names) if name and name in names[:place]), None)


def _number(cell: str, separator: str) -> float | None:
    """The number that a cell is, with a decimal comma where commas do not separate; None if it is none."""
    if separator != "," and cell.count(",") == 1 and "." not in cell:
        cell = cell.replace(",", ".")
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _not_text(path: Path, error: UnicodeDecodeError) -> DataError:
    if error.encoding.startswith("utf-8") or error.encoding == "utf8":
        with path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                try:
                    data.decode()
                except UnicodeDecodeError as wrong:
                    return DataError(
                        f"{path.name} line {line} is not UTF-8 text: byte {data[wrong.start]:#04x}; save it as UTF-8"
                    )
    return DataError(f"{path.name} is no whole {error.encoding.upper()} text ({error.reason}); save it as UTF-8")
