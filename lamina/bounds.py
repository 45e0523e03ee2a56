"""The bounds of what a message or a manifest may say: numbers, lengths, text. Whoever sends it, nothing beyond them is read.

They are far above what any run needs and below what would hurt the reader: counts fit the database and a float exactly, sums of
products of legal numbers stay finite, and no list makes a small machine work for minutes. Text is made printable as it is read
(`lamina.printable`), so that it is safe wherever it is stored and shown.
"""

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field

from lamina.printable import printable

MAX_COUNT = 2**53
"""Integers up to here are exact as floats, also where a reader's JSON knows no others."""
MAX_SECONDS = 10 * 365 * 86400.0
MAX_LOSS = 1e39
"""Above all float32; times `MAX_COUNT` examples it is still a finite float."""
MAX_ITEMS = 100_000
MAX_SEGMENTS = 20_000
MAX_STAGES = 10_000
MAX_LAYERS = 4096
"""Of one encoder."""
MAX_ROUNDS = 1_000_000
MAX_FACTOR = 1e30
"""Learning rates, weights of losses and whatever else multiplies numbers of a model."""
MAX_TEXT = 4000
MAX_NOTE = 1000

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
Difference = Annotated[float, Field(ge=0, le=MAX_LOSS)]
Loss = Annotated[float, Field(ge=-MAX_LOSS, le=MAX_LOSS)]

Text = Annotated[str, AfterValidator(partial(printable, most=MAX_TEXT)), Field(json_schema_extra={"maxLength": MAX_TEXT})]
"""A sentence or a few from another machine: one printable line, cut at `MAX_TEXT` characters."""
Note = Annotated[str, AfterValidator(partial(printable, most=MAX_NOTE)), Field(json_schema_extra={"maxLength": MAX_NOTE})]

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""It stands in addresses, and on a device in the names of files."""
SegmentName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$", max_length=100)]


def _is_printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError(f"the name {printable(name, 60)!r} holds characters that cannot be printed")
    return name


TensorName = Annotated[str, Field(max_length=500), AfterValidator(_is_printable)]
Size = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Shape = Annotated[tuple[Size, ...], Field(max_length=16)]
