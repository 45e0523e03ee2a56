"""A table (CSV or TSV) with a row for each example: a column for each modality, and label, split, group and id if there are.

A cell holds a path relative to the table's folder, or a text where the model takes text. The column `file` serves the first
modality that has no column of its own.
"""

import csv
import difflib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lamina.data.faults import Faults
from lamina.data.items import Item, sorted_names
from lamina.errors import DataError
from lamina.model import ModelDescription

_USUAL = ("examples.csv", "labels.csv", "metadata.csv")


class FolderSource:
    """Reads the table line by line; the files only when an example is converted."""

    def __init__(self, path: Path, model: ModelDescription, names: Mapping[str, str]) -> None:
        """`path` is the table, or the folder that holds it. Raises DataError for a missing column, naming the nearest."""
        self._table = _find_table(path) if path.is_dir() else path
        self._model = model
        columns = self._header()
        self._columns = {modality: names.get(modality, modality) for modality in model.modalities}
        without = [modality for modality, column in self._columns.items() if column not in columns]
        if without and "file" in columns and without[0] not in names:
            self._columns[without.pop(0)] = "file"
        needed = [self._columns[modality] for modality in without]
        if model.objective.kind == "supervised" and "label" not in columns:
            needed.append("label")
        if needed:
            near = difflib.get_close_matches(needed[0], columns, 1, 0.5)
            hint = f"; did you mean {near[0]!r}? Rename it, or pass --rename {needed[0]}={near[0]}" if near else ""
            raise DataError(f"{self._table} has no column {needed[0]!r}, it has {', '.join(columns) or 'none'}{hint}")
        self._has = set(columns)

    @property
    def words(self) -> str:
        return f"table {self._table}"

    def count(self) -> int | None:
        return sum(1 for _ in self._rows())

    @cached_property
    def class_names(self) -> tuple[str, ...] | None:
        if "label" not in self._has:
            return None
        return sorted_names({(row.get("label") or "").strip() for _, row in self._rows()} - {""})

    def items(self, faults: Faults) -> Iterator[Item]:
        for line, row in self._rows():
            name = f"{self._table.name} line {line}"
            if None in row or None in row.values():
                faults.add(name, f"has more or fewer cells than the {len(self._has)} columns", items_left_out=1)
                continue
            cells = {column: cell.strip() for column, cell in row.items()}
            taken = {modality: cells[column] for modality, column in self._columns.items()}
            empty = [
                self._columns[m] for m, cell in taken.items() if not cell and self._model.encoder(m).input.kind != "text_tokens"
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
        return path if cell.endswith(".txt") and path.is_file() else cell

    def _header(self) -> list[str]:
        with self._open() as file:
            row = next(csv.reader(file, delimiter=self._delimiter), [])
        return [column.strip() for column in row]

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        columns = self._header()
        try:
            with self._open() as file:
                reader = csv.DictReader(file, columns, delimiter=self._delimiter)
                next(reader, None)
                for row in reader:
                    yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise DataError(f"{self._table} is not UTF-8 text; save it as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{self._table}: {error}") from error

    def _open(self) -> Any:
        return self._table.open(encoding="utf-8-sig", newline="")

    @property
    def _delimiter(self) -> str:
        return "\t" if self._table.suffix == ".tsv" else ","


def _find_table(folder: Path) -> Path:
    tables = sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".tsv") and not path.name.startswith("."))
    usual = [path for path in tables if path.name in _USUAL]
    if len(tables) == 1 or len(usual) == 1:
        return (usual or tables)[0]
    if not tables:
        raise DataError(f"{folder} has no CSV table; write one with the columns file and label")
    raise DataError(f"{folder} has {len(tables)} tables ({', '.join(t.name for t in tables[:4])}); name one as the source")
