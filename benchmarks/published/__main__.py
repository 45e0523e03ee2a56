"""Does the cost report give the figures that were published?

    python -m benchmarks.published [--write]          --write: also put the table into docs/cost.md

Needs `transformers` 5 for the published models' modules, and no network: weights are neither loaded nor made.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.published.checks import Check, all_checks

PAGE = Path(__file__).parent.parent.parent / "docs" / "cost.md"
BEGIN = "<!-- made by `python -m benchmarks.published --write` -->"
END = "<!-- end -->"
BOUND = 0.015
"""Largest deviation allowed, as a fraction."""


def rendered(checks: Sequence[Check]) -> str:
    """The table as Markdown."""
    rows = ["| method | quantity | published | source | counted | deviation |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {c.method} | {c.quantity} | {c.published} | {c.source} | {c.shown} | {_percent(c.deviation)} |" for c in checks
    ]
    return "\n".join(rows) + "\n"


def table_of(page: str) -> str:
    """The table between the marks of the page."""
    return page.partition(f"{BEGIN}\n\n")[2].partition(f"\n{END}")[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description="Check published costs.")
    parser.add_argument("--write", action="store_true", help="put the table into docs/cost.md")
    should_write = parser.parse_args().write
    checks = all_checks()
    table = rendered(checks)
    print(table)
    if should_write:
        page = PAGE.read_text()
        PAGE.write_text(page.replace(f"{BEGIN}\n\n{table_of(page)}\n{END}", f"{BEGIN}\n\n{table}\n{END}"))
    off = [check for check in checks if check.shown != check.published and abs(check.deviation) > BOUND]
    same = sum(check.shown == check.published for check in checks)
    print(f"{len(checks)} figures, {same} equal to the printed digit, {len(off)} off by more than {100 * BOUND:g} %")
    sys.exit(1 if off else 0)


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction, 2) + 0.0:+.2f} %"  # + 0.0: no minus before a zero


if __name__ == "__main__":
    main()
