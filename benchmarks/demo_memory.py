"""How much memory does each device of the demo take, layer by layer and end to end?

Question   Peak resident set of every `lamina join` process of the demo, with one layer per stage and with the whole model at
           once, on the same engines and data.
Method     `lamina demo` itself, one round for each stage; the figure is VmHWM as the devices report it with their updates.
Not shown  Larger models: this one has 0.6 M parameters, so the process itself is most of the figure (`lamina bench memory`).

    python -m benchmarks.demo_memory
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_results

ROUNDS = {"layerwise": 6, "end_to_end": 1}
KEPT = ("name", "engine", "examples", "peak_bytes")


def main() -> None:
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        for strategy, rounds in ROUNDS.items():
            out = Path(scratch) / strategy
            options = ["--strategy", strategy, "--rounds", str(rounds), "--no-baselines", "--out", str(out)]
            subprocess.run([sys.executable, "-m", "lamina.cli.main", "demo", *options], check=True)
            devices = json.loads((out / "report.json").read_text())["devices"]
            rows += [{"strategy": strategy} | {key: device[key] for key in KEPT} for device in devices]
    whole = {row["name"]: row["peak_bytes"] for row in rows if row["strategy"] == "end_to_end"}
    table = Table(title="peak of each device's process in the demo")
    for heading in ("strategy", "device", "engine", "examples", "peak MiB", "end to end / this"):
        table.add_column(heading)
    for row in rows:
        row["below_end_to_end_on_the_same_engine"] = whole[row["name"]] / row["peak_bytes"]
        ratio = f"{row['below_end_to_end_on_the_same_engine']:.2f}"
        peak = f"{row['peak_bytes'] / 2**20:.1f}"
        table.add_row(row["strategy"], row["name"], row["engine"], str(row["examples"]), peak, ratio)
    console = Console()
    console.print(table)
    console.print(f"written to {write_results('memory-demo', 'make bench-memory', rows, rounds=ROUNDS)}")


if __name__ == "__main__":
    main()
