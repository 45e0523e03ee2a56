"""How much memory does a whole lamina device take, layer by layer and end to end?

Question   Peaks of the device's own processes (supervisor, talk, train) for the workload vit12: one block with micro-batch 1,
           and all 12 blocks with the whole batch of 16.
Method     `edge_client.train.trainer` does a real job, fresh for each case; features are made in its process (`fill`) or
           are there already (`train`). `device` is the supervisor plus the larger of talk and train, which never run at the
           same time. Eager PyTorch end to end is taken from benchmarks/results/memory.json.
Not shown  Data sets that are larger than two batches: rows are read from the file, one micro-batch at a time.

    python -m benchmarks.client_memory
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.device.job_alone import base_peaks, measure_stage
from benchmarks.device.workloads import OPTIMIZERS, WORKLOADS, Graph, one_stage_plan
from benchmarks.results_file import RESULTS, write_results
from lamina.bundles.manifest import EngineName

ENGINES: tuple[EngineName, ...] = ("onnxruntime", "executorch")
CASES: tuple[tuple[Graph, int | None], ...] = (("full", None), ("cut", 1))
MIB = 1 << 20


def main() -> None:
    console = Console()
    workload = WORKLOADS["vit12"]
    rows: list[dict[str, Any]] = []
    for engine in ENGINES:
        base = base_peaks(engine)
        for optimizer, settings in OPTIMIZERS.items():
            for graph, micro_batch in CASES:
                plan = one_stage_plan(workload, graph, None, workload.batch, micro_batch)
                plan = plan.model_copy(update={"training": plan.training.model_copy(update={"optimizer": settings})})
                with TemporaryDirectory() as folder:
                    peaks = measure_stage(plan, 0, engine, Path(folder))
                device = base["supervisor_bytes"] + max(base["talk_bytes"], *peaks.values())
                facts = {"engine": engine, "optimizer": optimizer, "graph": graph, "micro_batch": micro_batch}
                rows.append({**facts, **base, **peaks, "device_bytes": device})
                console.print(f"{engine}, {optimizer}, {graph}: device {device / MIB:.1f} MiB", highlight=False)
    eager = eager_peaks()
    table = Table(title="vit12: peaks of a device's processes, MiB")
    for heading in ("engine", "optimizer", "graph", "train", "device", "end to end / this", "eager end to end / this"):
        table.add_column(heading, justify="left" if heading in ("engine", "optimizer", "graph") else "right")
    for row in rows:
        same = next(r for r in rows if (r["engine"], r["optimizer"], r["graph"]) == (row["engine"], row["optimizer"], "full"))
        for name in ("train_bytes", "device_bytes"):
            row[f"below_end_to_end_{name}"] = same[name] / row[name]
            if row["optimizer"] in eager:
                row[f"below_eager_{name}"] = eager[row["optimizer"]] / row[name]
        table.add_row(
            row["engine"],
            row["optimizer"],
            row["graph"],
            f"{row['train_bytes'] / MIB:.1f}",
            f"{row['device_bytes'] / MIB:.1f}",
            f"{row['below_end_to_end_train_bytes']:.1f} (device {row['below_end_to_end_device_bytes']:.1f})",
            f"{row.get('below_eager_train_bytes', 0):.1f} (device {row.get('below_eager_device_bytes', 0):.1f})",
        )
    console.print(table)
    console.print(f"written to {write_results('memory-client', 'make bench-memory', rows)}")


def eager_peaks() -> dict[str, int]:
    """Peak of eager end-to-end training by optimiser; empty before `lamina bench memory` was run."""
    path = RESULTS / "memory.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())["rows"]
    return {
        row["optimizer"]: row["peak_rss_bytes"]
        for row in found
        if (row["side"], row["case"]) == ("eager", "full") and row.get("peak_rss_bytes")
    }


if __name__ == "__main__":
    main()
