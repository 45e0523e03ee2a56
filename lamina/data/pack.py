"""Goes over a source once: converts and checks every example, and writes the good ones if a target is given.

`pack` makes the file that a device trains from; `check` does the same without writing. Both report all that is wrong, not only
the first fault. One example is in memory at a time.
"""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.card import DataCard, classes_field, conflicts, describe_conflict, joined, read_card
from lamina.data.classes import Classes, choose_classes, listed, read_names
from lamina.data.convert import Converter, Settings, make_converter
from lamina.data.faults import Faults
from lamina.data.items import Array, Item, Source
from lamina.data.sources import Kind, SourceSettings, find_kind, open_source
from lamina.data.sources.arrays import ArraySource, is_packed
from lamina.data.split import choose_test
from lamina.data.writer import Writer
from lamina.errors import ConfigError, DataError
from lamina.files import write_durably
from lamina.plans.model import ModelDescription

OnProgress = Callable[[int, int | None], None]


@dataclass
class Column:
    """What was seen of one modality: shape of a row, dtype, and the range of all values."""

    shape: tuple[int, ...]
    dtype: str
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    squares: float = 0.0
    values: int = 0

    def add(self, row: Array) -> None:
        wide = row.reshape(-1).astype(np.float64)
        self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))
        self.total += float(wide.sum())
        # Not `wide @ wide`: for so short a product the threads of a BLAS wait for each other much longer than they compute.
        self.squares += float(np.square(wide).sum())
        self.values += wide.size

    @property
    def mean(self) -> float:
        return self.total / max(1, self.values)

    @property
    def std(self) -> float:
        return float(np.sqrt(max(0.0, self.squares / max(1, self.values) - self.mean**2)))


@dataclass
class Report:
    """What a source holds. `classes` maps each split to the number of examples of each class; empty without labels.

    `card` says how it was or would be packed. `is_packable` is False where a fault is one of the whole source.
    """

    source: str
    columns: dict[str, Column]
    faults: Faults
    warnings: Faults
    examples: dict[str, int] = field(default_factory=dict)
    classes: dict[str, list[int]] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    left_out: int = 0
    card: DataCard | None = None
    is_packable: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """Everything but source, model and target. `test_share` None makes all examples training examples.

    `card` is what the source has to agree with, that of a plan or of another device; `card_words` say where it stands.
    """

    kind: Kind | None = None
    source: SourceSettings = field(default_factory=SourceSettings)
    convert: Settings = field(default_factory=Settings)
    classes: str | Path | tuple[str, ...] | None = None
    test_share: float | None = 0.2
    seed: int = 0
    max_faults: int = 20
    card: DataCard | None = None
    card_words: str = "in the card that was given"


def pack(
    source: str,
    model: ModelDescription,
    out: Path,
    options: Options | None = None,
    skip_bad: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Report:
    """Writes `out` with its data card, and `<out>.classes.txt` where labels are names. With `skip_bad`, faulty ones are left
    out.

    Raises DataError that lists the faults, and writes nothing, if there are any and `skip_bad` is not set, or if class names
    cannot be put in order or differ from those of `options.card`, or anything else does.
    """
    options = options or Options()
    kind = options.kind or find_kind(source, options.source)
    scan = _Scan(open_source(source, kind, model, options.source), model, options, card_of(source))
    dtypes = {name: converter.dtype for name, converter in scan.converters.items()}
    shapes = {name: converter.shape for name, converter in scan.converters.items()}
    with Writer(out, dtypes, shapes) as writer:
        report = scan.run(on_progress, writer, skip_bad)
        if report.faults.total and not (skip_bad and report.is_packable):
            lines = "\n".join(f"  {line}" for line in report.faults.lines())
            way_out = "mend them"
            if report.is_packable:
                way_out += ", or leave such examples out with --skip-bad"
            raise DataError(f"{source} has {report.faults.total} faults; {way_out}:\n{lines}")
        if not report.examples.get("train"):
            first = f"; the first fault: {report.faults.kept[0]}" if report.faults.kept else ""
            raise DataError(f"{source} has no good training example{first}")
        if scan.classes is not None and scan.classes.names:
            write_durably(classes_path(out), "".join(f"{name}\n" for name in scan.classes.names).encode())
        labels = np.asarray(scan.labels, np.int64) if scan.classes is not None else None
        writer.finish(scan.is_test, labels, report.card)
    return report


def check(
    source: str,
    model: ModelDescription,
    options: Options | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Report:
    """What `pack` would find. An .npz file with train_ arrays is read as a device reads it: nothing is cast."""
    options = options or Options()
    if options.kind is None and is_packed(Path(source)):
        opened: Source = ArraySource(Path(source), model, options.source.names, is_strict=True)
        options = replace(options, convert=Settings())
    else:
        opened = open_source(source, options.kind or find_kind(source, options.source), model, options.source)
    return _Scan(opened, model, options, card_of(source)).run(on_progress, None, skip_bad=False)


def card_of(source: str) -> DataCard | None:
    """The card of a source that was packed before; None for any other. Raises DataError for one that is damaged."""
    path = Path(source)
    return read_card(path) if path.suffix == ".npz" and path.is_file() else None


def classes_path(out: Path) -> Path:
    """Where the class names of a packed file stand, one a line in the order of their indices."""
    return out.with_name(f"{out.name.removesuffix('.npz')}.classes.txt")


class _Scan:
    """One pass. After `run`: `labels` and `is_test` of the good examples, in order."""

    def __init__(self, source: Source, model: ModelDescription, options: Options, card: DataCard | None = None) -> None:
        """`card` is that of the source, if it was packed before."""
        for option, given in (("--mean", options.convert.mean), ("--std", options.convert.std)):
            unknown = [name for name in given if name not in model.modalities]
            if unknown:
                raise ConfigError(f"{option} names {unknown[0]!r}; the model has {', '.join(model.modalities)}")
        self._source, self._options, self._card = source, options, card
        self.converters: dict[str, Converter] = {e.modality: make_converter(e, options.convert) for e in model.encoders}
        self.classes: Classes | None = None
        if model.labels is not None:
            names = options.classes
            if isinstance(names, str | Path):
                names = read_names(names)
            if card is not None and isinstance(card.classes, tuple):
                if names not in (None, card.classes):
                    raise DataError(
                        f"{source.words} were packed with the class names {listed(card.classes)}, --classes says "
                        f"{listed(names or ())}: pack what they were made of again"
                    )
                names = card.classes
            self.classes = choose_classes(model.labels, source.labels, names)
        self.labels = array("q")
        self.is_test: NDArray[np.bool_] = np.zeros(0, bool)
        self._names: list[str] = []
        self._splits: list[str | None] = []
        self._groups: list[str | None] = []
        self._keys: dict[str, str] = {}
        self._strata: dict[Any, int] = {}
        numbers = [name for name, converter in self.converters.items() if converter.dtype.kind == "f"]
        self._digests = {name: array("Q") for name in numbers or self.converters}

    def run(self, on_progress: OnProgress, writer: Writer | None, skip_bad: bool) -> Report:
        faults, warnings = Faults(self._options.max_faults), Faults(self._options.max_faults)
        columns = {name: Column(c.shape, str(c.dtype)) for name, c in self.converters.items()}
        report = Report(self._source.words, columns, faults, warnings, names=self.classes.names if self.classes else None)
        total, bad = self._source.count(), 0
        if self.classes is not None and self.classes.mismatch:
            faults.add(self._source.words, self.classes.mismatch)
            report.is_packable = False
        for done, item in enumerate(self._source.items(faults), start=1):
            rows = self._take(item, faults, warnings)
            if rows is None:
                bad += 1
            else:
                for name, row in rows.items():
                    columns[name].add(row)
                # After a fault that forbids the file there is nothing to write, only more to find.
                if writer is not None and (skip_bad or not faults.total):
                    writer.append(rows)
            on_progress(done, total)
        report.left_out = bad + faults.items_left_out
        self._split()
        self._summarise(report)
        report.card = self._make_card()
        if self._options.card is not None:
            mine, theirs = report.card.fields(), self._options.card.fields()
            for name in conflicts(mine, theirs):
                what = describe_conflict(name, mine[name], theirs[name], self._options.card_words)
                faults.add(self._source.words, what)
                report.is_packable = False
        return report

    def _make_card(self) -> DataCard:
        """What was decided here, and before where the source was packed already."""
        before = self._card or DataCard()
        own = self._options.source.names
        cards = {
            name: joined(converter.card(), before.modalities.get(own.get(name, name)))
            for name, converter in self.converters.items()
        }
        names = self.classes.names if self.classes is not None and not self.classes.mismatch else None
        return DataCard(classes=classes_field(names) if names else before.classes, modalities=cards)

    def _take(self, item: Item, faults: Faults, warnings: Faults) -> dict[str, Array] | None:
        """The rows of a good example, noted as such; None, and its faults, for another one."""
        before, rows, label = faults.total, {}, 0
        try:
            label = self._label(item)
        except DataError as error:
            faults.add(item.name, error.message)
        if item.split not in (None, "train", "test"):
            faults.add(item.name, f"split {item.split!r} is neither train nor test")
        if item.key is not None:
            earlier = self._keys.setdefault(item.key, item.name)
            if earlier is not item.name:
                faults.add(item.name, f"is the same example as {earlier}")
        for name, converter in self.converters.items():
            try:
                rows[name] = converter(item.values[name])
            except DataError as error:
                value = item.values[name]
                file = f" {value.name}" if isinstance(value, Path) else ""
                faults.add(item.name, f"{name}{file}: {error.message}")
        if faults.total > before:
            return None
        for name, row in rows.items():
            is_constant = row.size > 1 and bool((row == row.flat[0]).all())
            if is_constant:
                warnings.add(item.name, f"{name}: all {row.size} values are {row.flat[0]}")
            if name in self._digests:
                digest = 0 if is_constant else int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little")
                self._digests[name].append(digest)
        self._names.append(item.name)
        self._splits.append(item.split)
        self._groups.append(item.group)
        self.labels.append(label)
        return rows

    def _label(self, item: Item) -> int:
        """The class, or without classes any number that tells labels apart."""
        if self.classes is not None:
            return self.classes.index(item.label)
        return self._strata.setdefault(str(item.label), len(self._strata))

    def _split(self) -> None:
        given = {split for split in self._splits if split is not None}
        if given and None in self._splits:
            first = self._names[self._splits.index(None)]
            raise DataError(f"{first} has no split, but others have; give every example one, or none")
        if given:
            self.is_test = np.array([split == "test" for split in self._splits], bool)
        elif self._options.test_share is None:
            self.is_test = np.zeros(len(self._names), bool)
        else:
            self.is_test = choose_test(self.labels, self._groups, self._options.test_share, self._options.seed)

    def _summarise(self, report: Report) -> None:
        masks = {"train": ~self.is_test, "test": self.is_test}
        report.examples = {split: int(mask.sum()) for split, mask in masks.items()}
        if self.classes is not None:
            labels = np.asarray(self.labels, np.int64)
            counts = {split: np.bincount(labels[mask], minlength=self.classes.count).tolist() for split, mask in masks.items()}
            report.classes = counts
            for index, count in enumerate(counts["train"]):
                if not count:
                    tests = f", {counts['test'][index]} in test" if counts["test"][index] else ""
                    report.warnings.add(f"class {self.classes.shown(index)}", f"has no example in train{tests}")
        for name, digests in self._digests.items():
            self._warn_of_duplicates(name, np.asarray(digests, np.uint64), report.warnings)
        seen = {name: Counter(converter.seen) for name, converter in self.converters.items()}
        report.notes = [f"{name}: {count} {what}" for name, counts in seen.items() for what, count in counts.items()]

    def _warn_of_duplicates(self, name: str, digests: NDArray[np.uint64], warnings: Faults) -> None:
        """The same row in train and in test makes the test accuracy too good."""
        in_train = {int(digest): index for index, digest in enumerate(digests) if not self.is_test[index] and digest}
        for index in np.flatnonzero(self.is_test):
            earlier = in_train.get(int(digests[index]))
            if earlier is not None:
                warnings.add(self._names[index], f"{name}: in test, and the same in train: {self._names[earlier]}")
