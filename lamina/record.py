"""The base of everything that is written to disk or sent: immutable, and closed to unknown keys.

A misspelled key is refused with its name instead of being ignored, because a typo that is ignored becomes a run.
"""

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, SerializationInfo, SerializerFunctionWrapHandler, ValidationError, model_serializer

from lamina.errors import ConfigError
from lamina.printable import printable


class Record(BaseModel):
    """A frozen pydantic model that refuses unknown fields, NaN and infinity.

    Its JSON leaves out every field that holds its default, so a reader from before a field understands everything that it
    could say itself. What a field means while it is absent therefore never changes: a default stays as it was published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if info.mode == "json":
            for name in _growing_fields(type(self)):
                if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                    values.pop(name, None)
        return values

    def to_json(self) -> bytes:
        """Indented UTF-8 JSON; the same record gives the same bytes."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes | str, source: str = "the JSON text") -> Self:
        """Raises ConfigError that names `source`, the field and what was wrong with it."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ConfigError(f"{source} is not a valid {cls.__name__}: {explain(error, cls)}") from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist") from error
        return cls.from_json(data, str(path))


@cache
def _growing_fields(record: type[BaseModel]) -> tuple[str, ...]:
    """The fields with a default, without the tags: a field of one literal value says what the record is."""
    return tuple(
        name
        for name, field in record.model_fields.items()
        if not (field.is_required() or (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1))
    )


def explain(error: ValidationError, record: type[BaseModel] | None = None, limit: int = 3) -> str:
    """The first few faults of a pydantic error as one line: `field.path: what is wrong (given: value)`.

    For a key that `record` does not have, the nearest one that it or a record inside it has. Keys and values are somebody
    else's: they are shown short and printable, and showing them costs the same however long they are.
    """
    return "; ".join(_faults(error, record, limit))


def listed(error: ValidationError, record: type[BaseModel] | None = None, limit: int = 20) -> str:
    """The faults for somebody who mends a file: one behind a colon, several on a line each."""
    faults = _faults(error, record, limit)
    return f": {faults[0]}" if len(faults) == 1 else ":" + "".join(f"\n  {fault}" for fault in faults)


def _faults(error: ValidationError, record: type[BaseModel] | None, limit: int) -> list[str]:
    faults = error.errors(include_url=False, include_context=False)
    lines = []
    for fault in faults[:limit]:
        where = printable(".".join(str(part)[:_SHOWN] for part in fault["loc"][-8:]), 2 * _SHOWN) or "(whole)"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{_nearest(str(fault['loc'][-1]), record)}")
            continue
        lines.append(f"{where}: {printable(fault['msg'], 1000)} (given: {_glimpse(fault.get('input'))})")
    if len(faults) > limit:
        lines.append(f"and {len(faults) - limit} more")
    return lines


_SHOWN = 60
_shortened = Repr()
_shortened.maxstring = _shortened.maxother = _SHOWN


def _glimpse(value: object) -> str:
    """The beginning of a value as Python writes it; only as much of it is looked at."""
    try:
        return printable(_shortened.repr(value), _SHOWN)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} that is too long to show"


def _nearest(key: str, record: type[BaseModel] | None) -> str:
    if len(key) > _SHOWN:  # nobody misspelt that, and comparing costs the square of its length
        return ""
    known = _keys(record, set()) if record else set()
    near = get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _keys(kind: Any, seen: set[Any]) -> set[str]:
    """The fields of a record and of all records inside it."""
    if kind in seen:
        return set()
    seen.add(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        inner = (_keys(field.annotation, seen) for field in kind.model_fields.values())
        return set(kind.model_fields).union(*inner)
    return set[str]().union(*(_keys(part, seen) for part in get_args(kind) if not isinstance(part, str)))
