"""The base of everything that is written to disk or sent: immutable, and closed to unknown keys.

A misspelled key is refused with its name instead of being ignored, because a typo that is ignored becomes a run.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from lamina.errors import ConfigError


class Record(BaseModel):
    """A frozen pydantic model that refuses unknown fields, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> bytes:
        """Indented UTF-8 JSON; the same record gives the same bytes."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes | str, source: str = "the JSON text") -> Self:
        """Raises ConfigError that names `source`, the field and what was wrong with it."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ConfigError(f"{source} is not a valid {cls.__name__}: {explain(error)}") from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist") from error
        return cls.from_json(data, str(path))


def explain(error: ValidationError, limit: int = 3) -> str:
    """The first few faults of a pydantic error as one line: `field.path: what is wrong (given: value)`."""
    faults = error.errors(include_url=False)
    lines = []
    for fault in faults[:limit]:
        where = ".".join(str(part) for part in fault["loc"]) or "(whole)"
        given = repr(fault.get("input"))
        lines.append(f"{where}: {fault['msg']} (given: {given[:60]})")
    if len(faults) > limit:
        lines.append(f"and {len(faults) - limit} more")
    return "; ".join(lines)
