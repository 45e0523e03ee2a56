"""A table (CSV or TSV) with a row for each example: a column for each modality, and label, split, group and id if there are.

A cell holds a path relative to the table's folder, or a text where the model takes text. The column `file` serves the first
modality that has no column of its own.
"""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lamina.data.faults import Faults
from lamina.data.items import Item
from lamina.data.tables import SEPARATORS, SUFFIXES, find_form, table_rows, twice
from lamina.errors import DataError
from lamina.plans.model import ModelDescription

_USUAL = ("examples.csv", "labels.csv", "metadata.csv")
_LONGEST_PATH = 1000
_OWN = ("file", "label", "split", "group", "id")


class FolderSource:
    """Reads the table line by line; the files only when an example is converted."""

    def __init__(self, path: Path, model: ModelDescription, names: Mapping[str, str]) -> None:
        """`path` is the table, or the folder that holds it. Raises DataError for a missing column, naming the nearest."""
        self._table = _find_table(path) if path.is_dir() else path
        self._model = model
        self._column_of = {modality: names.get(modality, modality) for modality in model.modalities}
        self._form = find_form(self._table, {*self._column_of.values(), *_OWN})
        columns = [cell.strip() for cell in next(table_rows(self._table, self._form), (1, []))[1]]
        self._columns = columns
        if (name := twice(columns)) is not None:
            raise DataError(
                f"{self._table} has two columns {name!r}; which of them holds cannot be known: rename or delete one"
            )
        without = [modality for modality, column in self._column_of.items() if column not in columns]
        if without and "file" in columns and without[0] not in names:
            self._column_of[without.pop(0)] = "file"
        needed = [self._column_of[modality] for modality in without]
        if model.labels is not None and "label" not in columns:
            needed.append("label")
        if needed:
            near = difflib.get_close_matches(needed[0], columns, 1, 0.5)
            hint = f"; did you mean {near[0]!r}? Rename it, or pass --rename {needed[0]}={near[0]}" if near else ""
            raise DataError(f"{self._table} has no column {needed[0]!r}, it has {', '.join(columns) or 'none'}{hint}")

    @property
    def words(self) -> str:
        return f"table {self._table}, cells separated by {SEPARATORS[self._form.separator]}"

    def count(self) -> int | None:
        return sum(1 for _ in self._rows())

    @cached_property
    def labels(self) -> Counter[str] | None:
        if "label" not in self._columns:
            return None
        place = self._columns.index("label")
        return Counter(row[place].strip() for _, row in self._rows() if len(row) == len(self._columns))

    def items(self, faults: Faults) -> Iterator[Item]:
        for line, row in self._rows():
            name = f"{self._table.name} line {line}"
            if len(row) != len(self._columns):
                what = f"has more or fewer cells than the {len(self._columns)} columns"
                lines = sum(cell.count("\n") for cell in row)
                if lines:
                    what += f", and takes up the {lines} lines below it: is there a quotation mark that does not end?"
                faults.add(name, what, items_left_out=1 + lines)
                continue
            cells = {column: cell.strip() for column, cell in zip(self._columns, row, strict=True)}
            taken = {modality: cells[column] for modality, column in self._column_of.items()}
            empty = [
                self._column_of[m]
                for m, cell in taken.items()
                if not cell and self._model.encoder(m).input.kind != "text_tokens"
            ]
            if empty:
                faults.add(name, f"the column {empty[0]!r} is empty", items_left_out=1)
                continue
            yield Item(
                name=f"{name} ({next(iter(taken.values()))[:60]})",
                values={modality: self._value(modality, cell) for modality, cell in taken.items()},
                label=cells.get("label"),
                split=cells.get("split"),
                group=cells.get("group") or None,
                key=cells["id"] if "id" in cells else repr(sorted(taken.items())),
            )

    def _value(self, modality: str, cell: str) -> Any:
        path = self._table.parent / cell
        if self._model.encoder(modality).input.kind != "text_tokens":
            return path
        return path if cell.endswith(".txt") and len(cell) < _LONGEST_PATH and path.is_file() else cell

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows below the header, each with the line where it begins."""
        rows = table_rows(self._table, self._form)
        next(rows, None)
        return rows


def _find_table(folder: Path) -> Path:
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    usual = [path for path in tables if path.name in _USUAL]
    if len(tables) == 1 or len(usual) == 1:
        return (usual or tables)[0]
    if not tables:
        raise DataError(f"{folder} has no CSV table; write one with the columns file and label")
    raise DataError(f"{folder} has {len(tables)} tables ({', '.join(t.name for t in tables[:4])}); name one as the source")
