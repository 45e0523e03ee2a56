"""All that is wrong with a data set, not only the first of it: counted without limit, kept up to one."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Fault(NamedTuple):
    """`item` is a file, a row or an index; `what` says what is wrong with it, the value, and what was expected."""

    item: str
    what: str

    def __str__(self) -> str:
        return f"{self.item}: {self.what}"


@dataclass
class Faults:
    """Keeps the first `limit` faults and counts the others.

    `items_left_out` are examples that a source could not even begin to give, such as one half of a pair.
    """

    limit: int = 20
    total: int = 0
    items_left_out: int = 0
    kept: list[Fault] = field(default_factory=list)

    def add(self, item: str, what: str, items_left_out: int = 0) -> None:
        self.total += 1
        self.items_left_out += items_left_out
        if len(self.kept) < self.limit:
            self.kept.append(Fault(item, what))

    def lines(self) -> list[str]:
        """One line for each fault that was kept, and the number of the others."""
        more = self.total - len(self.kept)
        return [*map(str, self.kept), *([f"and {more} more"] if more else [])]
