"""Does saving memory and bytes cost accuracy?

Question   Final test accuracy on AV-Digits MEDIUM, layer-wise over 4 devices, of everything switched on (micro-batches, int8
           features, int8 prefix, int8 updates, fp16 downloads, zstd) and of each alone, against plain float32 without a
           feature cache; 3 seeds.
Method     The demo's plan and data, through real processes on ONNX Runtime. A row is the mean over seeds.
Not shown  Larger models; seeds and settings of the demo were chosen on the same data (`benchmarks.demo_plan`).

    python -m benchmarks.accuracy [--seeds 0,1,2] [--rows NAME,NAME]
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.data.av_digits import load_av_digits
from benchmarks.demo import DemoSettings, deal_data
from benchmarks.demo_plan import MODEL, demo_plan
from benchmarks.federated import federated_run
from benchmarks.results_file import write_results
from lamina.plan import FeatureStore

DEVICES, ROUNDS, BOUND_POINTS = 4, 18, 1.0
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
    no_cache = ["--disk-mb", "0"] if name == PLAIN else []
    _, status = federated_run(plan, files, ["onnxruntime"] * DEVICES, folder, no_cache)
    reports = [update.report for row in status.rounds for update in row.updates]
    return {
        "what": name,
        "seed": seed,
        "test_accuracy": status.rounds[-1].test_accuracy,
        "bytes_both_ways": sum(report.bytes_down + report.bytes_up for report in reports),
        "peak_bytes": max(report.peak_bytes for report in reports),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default=",".join(SETTINGS))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = [name for name in SETTINGS if any(name.startswith(wanted) for wanted in options.rows.split(","))]
    console = Console()
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for name in names:
            with TemporaryDirectory() as folder:
                rows.append(accuracy(name, seed, Path(folder)))
            console.print(f"seed {seed}, {name}: {rows[-1]['test_accuracy']:.4f}", highlight=False)
    table = Table(title=f"AV-Digits MEDIUM, {DEVICES} devices, {ROUNDS} rounds, seeds {options.seeds}")
    for heading in ("what", "accuracy", "spread", "points against plain", "MB a device"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    means: list[dict[str, Any]] = []
    for name in names:
        mine = [row for row in rows if row["what"] == name]
        values = [row["test_accuracy"] for row in mine]
        mean = statistics.mean(values)
        plain = next((found["test_accuracy_mean"] for found in means if found["what"] == PLAIN), None)
        points = 100 * (mean - plain) if plain is not None else 0.0
        means.append({"what": name, "test_accuracy_mean": mean, "points_against_plain": points})
        moved = statistics.mean(row["bytes_both_ways"] for row in mine) / DEVICES / 1e6
        spread = f"{min(values):.3f} to {max(values):.3f}"
        table.add_row(name, f"{mean:.4f}", spread, f"{points:+.2f}", f"{moved:.2f}")
    console.print(table)
    path = write_results("accuracy", "make bench-accuracy", rows, means=means, bound_points=BOUND_POINTS, seeds=seeds)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
