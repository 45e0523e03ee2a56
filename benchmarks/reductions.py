"""How many FLOPs and bytes does one device save over a whole run, against end-to-end training of the same model?

Question   ViT-Tiny of 12 blocks (workload vit12), 12 layer-wise stages against end to end, the same number of rounds and
           epochs: multiply-accumulates and bytes of one device, and what each part of the saving is.
Method     Bytes: each row is a run over real processes and HTTP; what the device reported with its updates, so weights,
           programs, the manifest, frozen segments and control messages are all in it. FLOPs: torch's counter on each stage's
           cut module for one sample, times the samples that the run trains; the prefix runs once a stage over the device's
           samples (feature cache), or in every epoch (without).
Not shown  Time on a real network; accuracy (`benchmarks.accuracy`); the evaluation that follows a round, on either side.

    python -m benchmarks.reductions [--quick]        --quick: the tiny workload, to try the script
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.demo.federated import federated_run
from benchmarks.device.job_alone import random_examples
from benchmarks.device.workloads import WORKLOADS
from benchmarks.results_file import write_results
from lamina.bundles.manifest import Manifest
from lamina.plans.model import ModelDescription
from lamina.plans.plan import SGD, Cohort, Plan, StrategyName, Training
from lamina.plans.strategies import make_stages
from lamina.wire import RunStatus

ROUNDS_PER_STAGE, LOCAL_EPOCHS = 2, 2
BOUND = 10.0

# Each row adds one thing to the row above it.
SETTINGS: dict[str, tuple[StrategyName, dict[str, Any]]] = {
    "end to end, fp32": ("end_to_end", {}),
    "one layer a stage, fp32": ("layerwise", {}),
    "+ fp16 both ways": ("layerwise", {"download_encoding": "fp16", "upload_encoding": "fp16"}),
    "+ zstd": ("layerwise", {"download_encoding": "fp16", "upload_encoding": "fp16", "compression": "zstd"}),
    "+ int8 up": ("layerwise", {"download_encoding": "fp16", "upload_encoding": "int8", "compression": "zstd"}),
    "+ int8 down": ("layerwise", {"download_encoding": "int8", "upload_encoding": "int8", "compression": "zstd"}),
}


def make_plan(model: ModelDescription, strategy: StrategyName, batch_size: int, settings: dict[str, Any]) -> Plan:
    layers = max(encoder.layers for encoder in model.encoders)
    return Plan(
        name=f"{model.name}_{strategy}",
        model=model,
        strategy=strategy,
        stages=make_stages(model, strategy, layers * ROUNDS_PER_STAGE, 1e-3),
        training=Training(batch_size=batch_size, local_epochs=LOCAL_EPOCHS, optimizer=SGD(momentum=0.9), **settings),
        cohort=Cohort(size=1),
    )


def flops(manifest: Manifest, is_cached: bool) -> dict[str, int]:
    """Multiply-accumulates for one sample of the device over the whole run: training steps and frozen prefix."""
    train = prefix = 0
    for stage, programs in zip(manifest.plan.stages, manifest.stages, strict=True):
        epochs = stage.rounds * manifest.plan.training.local_epochs
        train += epochs * programs.cost.flops_per_sample
        if not is_cached:
            prefix += epochs * programs.cost.prefix_flops_per_sample
    if is_cached:
        # Each stage runs only the segments that it froze: the longest prefix is run once in all, over the features.
        prefix = max(programs.cost.prefix_flops_per_sample for programs in manifest.stages)
    return {"train_flops_per_sample": train, "prefix_flops_per_sample": prefix}


def bytes_of(status: RunStatus) -> dict[str, int]:
    reports = [update.report for row in status.rounds for update in row.updates]
    return {"bytes_down": sum(r.bytes_down for r in reports), "bytes_up": sum(r.bytes_up for r in reports)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    workload = WORKLOADS["tiny" if is_quick else "vit12"]
    console = Console()
    rows: list[dict[str, Any]] = []
    flop_rows: list[dict[str, Any]] = []
    for name, (strategy, settings) in SETTINGS.items():
        console.print(f"{name}: running", highlight=False)
        plan = make_plan(workload.model, strategy, workload.batch, settings)
        with TemporaryDirectory() as scratch:
            data = random_examples(workload.model, workload.batch, Path(scratch) / "data.npz")
            manifest, status = federated_run(plan, [data], ["onnxruntime"], Path(scratch) / "run")
        rows.append({"what": name, "rounds": len(status.rounds), **bytes_of(status)})
        if len(rows) <= 2:
            for is_cached in (False, True)[: 1 if strategy == "end_to_end" else 2]:
                label = name.removesuffix(", fp32") + (", feature cache" if is_cached else "")
                flop_rows.append({"what": label, **flops(manifest, is_cached)})
    whole = rows[0]["bytes_down"] + rows[0]["bytes_up"]
    for row in rows:
        row["below_end_to_end"] = whole / (row["bytes_down"] + row["bytes_up"])
    total = sum(flop_rows[0][key] for key in ("train_flops_per_sample", "prefix_flops_per_sample"))
    for row in flop_rows:
        row["below_end_to_end"] = total / (row["train_flops_per_sample"] + row["prefix_flops_per_sample"])

    moved = Table(title=f"bytes of one device over {rows[0]['rounds']} rounds, {workload.model.name} (bound {BOUND:g} x)")
    for heading in ("what", "MB down", "MB up", "end to end / this"):
        moved.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        moved.add_row(
            row["what"], f"{row['bytes_down'] / 1e6:.2f}", f"{row['bytes_up'] / 1e6:.2f}", f"{row['below_end_to_end']:.1f}"
        )
    worked = Table(title=f"multiply-accumulates of one device for each of its samples (bound {BOUND:g} x)")
    for heading in ("what", "training, G", "frozen prefix, G", "end to end / this"):
        worked.add_column(heading, justify="left" if heading == "what" else "right")
    for row in flop_rows:
        worked.add_row(
            row["what"],
            f"{row['train_flops_per_sample'] / 1e9:.2f}",
            f"{row['prefix_flops_per_sample'] / 1e9:.2f}",
            f"{row['below_end_to_end']:.1f}",
        )
    console.print(moved, worked)
    if not is_quick:
        facts = {"rounds_per_stage": ROUNDS_PER_STAGE, "local_epochs": LOCAL_EPOCHS, "examples": workload.batch}
        path = write_results("reductions", "make bench-reductions", rows, flops=flop_rows, bound=BOUND, **facts)
        console.print(f"written to {path}")


if __name__ == "__main__":
    main()
