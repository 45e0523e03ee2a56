"""Where benchmark results go: JSON with the command, the machine and the versions beside the numbers."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.report import versions

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, command: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Writes `benchmarks/results/<name>.json` and gives its path."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _read(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor(),
    )
    content = {
        "command": command,
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions(),
        **facts,
        "rows": rows,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
