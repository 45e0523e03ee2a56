"""Does saving memory and bytes cost accuracy?

Question   Final test accuracy on AV-Digits MEDIUM, layer-wise over 4 devices, of everything switched on (micro-batches, int8
           features, int8 prefix, int8 updates, fp16 downloads, zstd) and of each alone, against plain float32 without a
           feature cache; 3 seeds.
Method     The demo's data, and its plan without gradient blending, through real processes on ONNX Runtime. A row is the mean
           over seeds.
Not shown  Larger models; seeds and settings of the demo were chosen on the same data (`benchmarks.demo.plan`).

    python -m benchmarks.accuracy [--seeds 0,1,2] [--rows NAME,NAME] [--fresh]

A run that stands in the results file already is not done again, unless --fresh is given.
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data.av_digits import load_av_digits
from benchmarks.demo.demo import DemoSettings, deal_data
from benchmarks.demo.federated import federated_run
from benchmarks.demo.plan import MODEL, demo_plan
from benchmarks.results_file import RESULTS, write_results
from lamina.plans.plan import FeatureStore

DEVICES, ROUNDS, BOUND_POINTS = 4, 18, 1.0
RESULT = "accuracy"
PLAIN = "plain: fp32, no cache"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "feature cache, fp32": {},
    "feature cache, fp16": {"features": FeatureStore(encoding="fp16")},
    "feature cache, int8": {"features": FeatureStore(encoding="int8")},
    "int8 prefix": {"prefix_precision": "int8"},
    "fp16 both ways": {"download_encoding": "fp16", "upload_encoding": "fp16"},
    "fp16 down, int8 up": {"download_encoding": "fp16", "upload_encoding": "int8"},
    "int8 both ways": {"download_encoding": "int8", "upload_encoding": "int8"},
    "everything": {
        "micro_batch": 4,
        "features": FeatureStore(encoding="int8"),
        "prefix_precision": "int8",
        "download_encoding": "fp16",
        "upload_encoding": "int8",
        "compression": "zstd",
    },
}


def accuracy(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run to its end: accuracy on all devices' test examples, and what the devices reported."""
    settings = DemoSettings(
        out=folder,
        strategy="layerwise",
        engines=("onnxruntime",),
        devices=DEVICES,
        rounds=ROUNDS,
        layers_per_stage=1,
        seed=seed,
        level="medium",
        beta=1.0,
        with_baselines=False,
    )
    files = deal_data(*load_av_digits("medium", seed), settings, folder / "data")
    plan = demo_plan(MODEL, "layerwise", ROUNDS, 1, DEVICES, seed)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update=SETTINGS[name])})
    join_options = ["--resident", *(["--disk-mb", "0"] if name == PLAIN else [])]
    _, status = federated_run(plan, files, ["onnxruntime"] * DEVICES, folder, join_options)
    reports = [update.report for row in status.rounds for update in row.updates]
    return {
        "what": name,
        "seed": seed,
        "test_accuracy": status.rounds[-1].test_accuracy,
        "bytes_both_ways": sum(report.bytes_down + report.bytes_up for report in reports),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--rows", default=",".join(name.replace(",", "") for name in SETTINGS), help="names without their commas"
    )
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = [name for name in SETTINGS if any(name.replace(",", "").startswith(wanted) for wanted in options.rows.split(","))]
    console = Console()
    rows: list[dict[str, Any]] = [] if options.fresh else known_rows()
    for name in names:
        for seed in seeds:
            if any((row["what"], row["seed"]) == (name, seed) for row in rows):
                continue
            with TemporaryDirectory() as folder:
                rows.append(accuracy(name, seed, Path(folder)))
            console.print(f"seed {seed}, {name}: {rows[-1]['test_accuracy']:.4f}", highlight=False)
            write_rows(rows)
    console.print(table_of(summary(rows)))
    console.print(f"written to {write_rows(rows)}")


def known_rows() -> list[dict[str, Any]]:
    path = RESULTS / f"{RESULT}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def write_rows(rows: list[dict[str, Any]]) -> Path:
    return write_results(RESULT, "make bench-accuracy", rows, means=summary(rows), bound_points=BOUND_POINTS)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean of each setting over its seeds, and its distance from plain over the same seeds."""
    plain = {row["seed"]: row["test_accuracy"] for row in rows if row["what"] == PLAIN}
    means = []
    for name in SETTINGS:
        mine = [row for row in rows if row["what"] == name]
        if not mine:
            continue
        paired = [row["test_accuracy"] - plain[row["seed"]] for row in mine if row["seed"] in plain]
        means.append(
            {
                "what": name,
                "seeds": [row["seed"] for row in mine],
                "test_accuracy_mean": statistics.mean(row["test_accuracy"] for row in mine),
                "test_accuracy_range": [min(row["test_accuracy"] for row in mine), max(row["test_accuracy"] for row in mine)],
                "points_against_plain": 100 * statistics.mean(paired) if paired else None,
                "bytes_both_ways_per_device": statistics.mean(row["bytes_both_ways"] for row in mine) / DEVICES,
            }
        )
    return means


def table_of(means: list[dict[str, Any]]) -> Table:
    table = Table(title=f"AV-Digits MEDIUM, {DEVICES} devices, {ROUNDS} rounds")
    for heading in ("what", "seeds", "accuracy", "range", "points against plain", "MB a device"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in means:
        low, high = row["test_accuracy_range"]
        points = row["points_against_plain"]
        table.add_row(
            row["what"],
            str(len(row["seeds"])),
            f"{row['test_accuracy_mean']:.4f}",
            f"{low:.3f} to {high:.3f}",
            "-" if points is None else f"{points:+.2f}",
            f"{row['bytes_both_ways_per_device'] / 1e6:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
