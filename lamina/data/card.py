"""The data card: what packing decided about the examples of a device, and what must be equal on all devices of a run.

`lamina data pack` writes it into the .npz file, as the comment of the zip archive, which readers that know no cards pass over:
the line `lamina data card`, then JSON. A check-in names it by its hash, the coordinator asks for it once, and compares it with
the card of the plan and with those of the devices before. A file without a card, such as one of numpy, is compared with
nothing. What a card leaves open (None) is not known, and not compared either.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from lamina.bounds import MAX_COUNT
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, DataError
from lamina.plans.model import ModelDescription, Name
from lamina.printable import printable
from lamina.record import Record

_MARK = b"lamina data card\n"
MAX_CARD_BYTES = 16 << 10
MAX_NAMES_BYTES = 8 << 10
"""Class names that take more than this stand in the card as their hash."""
MAX_NUMBERS = 64
"""Likewise a mean or a standard deviation for more channels."""
MAX_TOKENS = 8
MOST_SCALE = 1e38
"""A mean or a standard deviation is a number that float32 can hold."""
_MOST_LISTED = 8
_AS_IT_WAS = ((0.0,), (1.0,))
_Tuple = tuple[float, ...]


def _is_printable(name: str) -> str:
    if not name.isprintable() or name != name.strip():
        raise ValueError(f"{printable(name, 60)!r} has characters that cannot be printed, or blanks around it")
    return name


Short = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_is_printable)]
Token = Annotated[str, AfterValidator(partial(printable, most=40)), Field(max_length=1000)]
Hash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
"""In place of a list that is too long to be shown."""
Number = Annotated[float, Field(ge=-MOST_SCALE, le=MOST_SCALE)]
Numbers = Annotated[tuple[Number, ...], Field(min_length=1, max_length=MAX_NUMBERS)] | Hash
Milliseconds = Annotated[float, Field(ge=0.1, le=60_000)]
ClassNames = Annotated[tuple[Short, ...], Field(min_length=1, max_length=MAX_NAMES_BYTES)] | Hash


class ModalityCard(Record):
    """How the values of one modality were made.

    `shape` is that of one example. `range` is what the values lie within before `mean` is subtracted and they are divided by
    `std`: one number, or one for each channel. `channels` are their names in order. `fit` says how images of other proportions
    were brought to the size. Sounds have `rate` samples a second, and spectral frames a window and a hop in milliseconds.
    `tokenizer` is `words`, `bytes` or the hash of a tokenizer file, `vocabulary` how many tokens it has, `tokens` the first.
    """

    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_COUNT)], ...], Field(max_length=16)] | None = None
    range: tuple[Number, Number] | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    channels: Annotated[tuple[Short, ...], Field(max_length=MAX_NUMBERS)] | None = None
    fit: Literal["stretch", "crop"] | None = None
    rate: Annotated[int, Field(ge=1, le=768_000)] | None = None
    window_ms: Milliseconds | None = None
    hop_ms: Milliseconds | None = None
    tokenizer: Literal["words", "bytes"] | Hash | None = None
    vocabulary: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    tokens: Annotated[tuple[Token, ...], Field(max_length=MAX_TOKENS)] | None = None


class DataCard(Record):
    """`classes` are the names of the labels in the order of their indices; None where labels were indices already."""

    format: Literal[1] = 1
    classes: ClassNames | None = None
    modalities: Annotated[dict[Name, ModalityCard], Field(max_length=64)] = Field(default_factory=dict)

    def misfit(self, model: ModelDescription) -> str:
        """Why this cannot be the data of a model; empty if it can."""
        strangers = sorted(set(self.modalities) - set(model.modalities))
        if strangers:
            return f"names {strangers[0]!r}; the model has {', '.join(model.modalities)}"
        for name, card in self.modalities.items():
            shape = model.encoder(name).input.shape
            if card.shape is not None and card.shape != shape:
                return f"says that an example of {name} has shape {card.shape}, the model takes {shape}"
        if isinstance(self.classes, tuple) and len(self.classes) != (model.labels or 0):
            return f"names {len(self.classes)} classes, the model has {model.labels or 'none'}"
        return ""

    @property
    def sha256(self) -> str:
        return hash_bytes(self.to_json())

    def fields(self) -> dict[str, Any]:
        """Everything that is known, by its name such as `classes` or `image.mean`, as JSON has it."""
        values = json.loads(self.model_dump_json())
        fields = {"classes": values["classes"]} if "classes" in values else {}
        for modality, card in values.get("modalities", {}).items():
            fields |= {f"{modality}.{name}": value for name, value in card.items()}
        return fields


def classes_field(names: Sequence[str]) -> tuple[str, ...] | str:
    """Class names as a card has them: the hash of too many."""
    text = "\n".join(names).encode()
    return tuple(names) if len(text) <= MAX_NAMES_BYTES else f"sha256:{hash_bytes(text)}"


def numbers_field(numbers: Sequence[float]) -> tuple[float, ...] | str:
    if len(numbers) <= MAX_NUMBERS:
        return tuple(numbers)
    return f"sha256:{hash_bytes(json.dumps(list(numbers)).encode())}"


def joined(now: ModalityCard, before: ModalityCard | None) -> ModalityCard:
    """The card of values that were packed as `before` says and then again as `now` says.

    Raises ConfigError if both together scale beyond what a card can say.
    """
    if before is None:
        return now
    values = dict(before) | {name: value for name, value in now if value is not None}
    if before.range is not None:
        values["range"] = before.range
    values["mean"], values["std"] = None, None
    old, new = (before.mean, before.std), (now.mean, now.std)
    if new in ((None, None), _AS_IT_WAS):
        values["mean"], values["std"] = old
    elif old == _AS_IT_WAS:
        values["mean"], values["std"] = new
    elif all(isinstance(each, tuple) for each in (*old, *new)):
        pairs = _scaled_twice(*(each for each in (*old, *new) if isinstance(each, tuple)))
        if not all(abs(number) <= MOST_SCALE for pair in pairs for number in pair):
            raise ConfigError(
                f"the values were scaled before, and both scalings together go beyond +-{MOST_SCALE:g}: pack what they were "
                "made of again"
            )
        values["mean"], values["std"] = zip(*pairs, strict=True)
    return ModalityCard(**values)


def _scaled_twice(mean: _Tuple, std: _Tuple, then_mean: _Tuple, then_std: _Tuple) -> list[tuple[float, float]]:
    """((x - a) / s - b) / t is (x - (a + s b)) / (s t)."""
    count = max(map(len, (mean, std, then_mean, then_std)))
    a, s, b, t = (each * count if len(each) == 1 else each for each in (mean, std, then_mean, then_std))
    return [(a[i] + s[i] * b[i], s[i] * t[i]) for i in range(count)]


def as_comment(card: DataCard) -> bytes:
    """As it stands in a file. Raises ConfigError for a card that is larger than any reader takes."""
    data = card.to_json()
    if len(data) > MAX_CARD_BYTES:
        raise ConfigError(
            f"the data card has {len(data)} bytes, at most {MAX_CARD_BYTES} are legal: --mean and --std are too many"
        )
    return _MARK + data


def read_card(path: Path) -> DataCard | None:
    """The card of a packed file; None if it has none. Raises DataError for a damaged one, or for a file that is no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no .npz file ({error}); write it with numpy.savez") from error
    if not comment.startswith(_MARK):
        return None
    try:
        return DataCard.from_json(comment[len(_MARK) :], f"the data card in {path}")
    except ConfigError as error:
        raise DataError(f"{error.message}; pack the file anew") from error


def load_card(path: Path) -> DataCard:
    """The card that a packed file or a .json file holds. Raises DataError or ConfigError, also for a file without one."""
    if not path.is_file():
        raise ConfigError(f"--card {path} does not exist; it takes a packed .npz file, or a card as .json")
    if path.suffix == ".json":
        return DataCard.from_file(path)
    card = read_card(path)
    if card is None:
        raise ConfigError(f"{path} has no data card, so it was not packed by `lamina data pack`, or by one from before cards")
    return card


def conflicts(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """The names of the fields that both know, and that differ."""
    return (name for name in theirs if name in mine and mine[name] != theirs[name])


def describe_conflict(name: str, mine: Any, theirs: Any, who: str) -> str:
    """A printable sentence with both values, and the option of `lamina data pack` that makes them equal."""
    first = ""
    if isinstance(mine, list) and isinstance(theirs, list) and max(len(mine), len(theirs)) > _MOST_LISTED:
        place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        pair = ", ".join(_listed(values[place : place + 1]) or "nothing" for values in (theirs, mine))
        first = f" (they differ first at place {place}: {pair})"
    what = "class names" if name == "classes" else name.replace(".", ": ")
    return f"{what} {shown_value(theirs)} {who}, {shown_value(mine)} in this data{first}; {_remedy(name, theirs)}"


def shown_value(value: Any) -> str:
    """A value of a card, short and printable."""
    if isinstance(value, list):
        return f"[{_listed(value)}]"
    return printable(f"{value:g}" if isinstance(value, float) else str(value), 120)


def _listed(values: Sequence[Any], most: int = _MOST_LISTED) -> str:
    texts = [f"{value:g}" if isinstance(value, float) else printable(str(value), 40) for value in values[:most]]
    return ", ".join(texts) + (f" and {len(values) - most} more" if len(values) > most else "")


_OPTIONS = {"fit": "--fit", "rate": "--rate", "window_ms": "--window-ms", "hop_ms": "--hop-ms"}


def _remedy(name: str, theirs: Any) -> str:
    modality, _, field = name.rpartition(".")
    again = "pack it again with"
    if name == "classes":
        texts = theirs if isinstance(theirs, list) else []
        is_short = texts and sum(map(len, texts)) <= 300 and not set("".join(texts)) & set(", '\"`$\\")
        return f"{again} --classes {','.join(texts) if is_short else 'FILE, with those names one a line'}"
    if field in ("mean", "std") and isinstance(theirs, list):
        return f"{again} --{field} {modality}={','.join(f'{number:.9g}' for number in theirs)}"
    if field in _OPTIONS:
        return f"{again} {_OPTIONS[field]} {theirs if not isinstance(theirs, float) else f'{theirs:g}'}"
    if field == "tokenizer":
        is_file = str(theirs).startswith("sha256:")
        return f"{again} --tokenizer FILE, the tokenizer of that hash" if is_file else f"{again} --tokenizer {theirs}"
    if field == "channels":
        return "bring the channels into that order, and pack it again"
    if field == "range":
        return "bring the values into that range, and pack it again"
    return f"{again} --card of a file that has that value"
