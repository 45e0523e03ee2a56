"""Messages of devices as they were stored: read also where they hold what is refused by now.

An older coordinator took numbers without a bound. Such a row is part of a run that goes on, so what is beyond a bound is read
as the bound, and a text that is too long is cut.
"""

import json
from typing import Any, TypeVar

from pydantic import ValidationError

from lamina.record import Record

Message = TypeVar("Message", bound=Record)


def read_stored(kind: type[Message], text: str) -> Message:
    """Raises ValidationError if the row holds no such message at all."""
    try:
        return kind.model_validate_json(text)
    except ValidationError:
        values = json.loads(text, parse_int=_whole)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            key = fault["loc"][0] if fault["loc"] else None
            if key in values:
                values[key] = _within(values[key], fault.get("ctx", {}))
        return kind.model_validate(values)


def _whole(digits: str) -> int:
    """Python refuses to read thousands of digits; their number decides as well."""
    return int(digits) if len(digits) < 400 else int(digits[:400])


def _within(value: Any, bounds: dict[str, Any]) -> Any:
    if "le" in bounds:
        return bounds["le"]
    if "ge" in bounds:
        return bounds["ge"]
    if "max_length" in bounds:
        return value[: bounds["max_length"]]
    return value
