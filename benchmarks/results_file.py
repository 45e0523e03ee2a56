"""Where benchmark results go: JSON with the command, the machine and the versions beside the numbers."""

import json
from pathlib import Path
from typing import Any

from benchmarks.demo.report import versions
from benchmarks.device.machine import machine

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, command: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Writes `benchmarks/results/<name>.json`, a line for each row, and gives its path."""
    facts = {"command": command, "machine": machine(), "versions": versions(), **facts}
    lines = ",\n".join(f"  {json.dumps(row, separators=(',', ':'))}" for row in rows)
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{json.dumps(facts, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    return path
