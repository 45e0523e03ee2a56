"""The proof of a rewrite: the original and its replacement on the same real input."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lamina.bundles.manifest import Rewrite
from lamina.errors import ParityError

TOLERANCE = 1e-5  # absolute, for values up to 1; relative to the largest value above


@dataclass
class _Found:
    count: int = 0
    largest_difference: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)


@dataclass
class Proofs:
    """Collects the rewrites of one module by kind."""

    where: str
    found: dict[str, _Found] = field(default_factory=dict)

    def add(self, kind: str, notes: Sequence[str], original: Callable[[], Any], actual: Any) -> None:
        """Raises ParityError if `actual` is not what `original()` gives; only the first of several results is compared."""
        expected = original()
        left, right = (value if isinstance(value, Tensor) else value[0] for value in (actual, expected))
        found = self.found.setdefault(kind, _Found())
        found.count += 1
        difference = float((left - right).abs().max()) if left.shape == right.shape else float("inf")
        allowed = TOLERANCE * max(1.0, float(right.abs().max()))
        if not difference <= allowed:
            raise ParityError(
                f"{self.where or 'the module'}: {kind}, call {found.count}: the replacement differs by {difference:.2g}, "
                f"allowed {allowed:.2g}; write this part of the layer in plain operations (docs/export.md), or check its "
                "example input for NaN"
            )
        found.largest_difference = max(found.largest_difference, difference)
        found.notes.update(notes)

    def rewrites(self) -> list[Rewrite]:
        return [
            Rewrite(
                where=self.where,
                kind=kind,
                count=found.count,
                largest_difference=found.largest_difference,
                note="; ".join(
                    note if count == found.count else f"{count} of {found.count}: {note}" for note, count in found.notes.items()
                ),
            )
            for kind, found in self.found.items()
        ]
