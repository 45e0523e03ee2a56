"""How far are the predictions of `lamina fit` from what the kernel counts?

Question   Predicted against measured peak of the training process, for models, engines, micro-batches and optimisers.
Method     `export.fit.needs` predicts from graphs; then the stage is exported and trained once by the device's own training
           process, fresh for each case, from stored features. The constants of `export.fit.needs` were fitted to some of these
           cases (marked) and judged on all.
Not shown  Other processors and other versions of the engines, whose constants may differ.

    python -m benchmarks.fit_predictions [--quick]        --quick: three cases, to try the script
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.device.job_alone import base_peaks, measure_stage
from benchmarks.device.workloads import OPTIMIZERS, WORKLOADS, one_stage_plan, vit_tiny_plan
from benchmarks.results_file import write_results
from export.fit.needs import MIB, OVERHEADS, stage_needs
from lamina.bundles.manifest import EngineName
from lamina.plans.plan import Plan

BOUND = 0.15


@dataclass(frozen=True)
class Case:
    model: str
    engine: EngineName
    micro_batch: int
    optimizer: str
    is_fitted_to: bool = False


CASES = (
    Case("vit12", "onnxruntime", 1, "adamw"),
    Case("vit12", "onnxruntime", 2, "sgd", True),
    Case("vit12", "onnxruntime", 4, "adamw"),
    Case("vit12", "onnxruntime", 16, "adamw", True),
    Case("vit12", "executorch", 1, "adamw", True),
    Case("vit12", "executorch", 2, "sgd"),
    Case("vit12", "executorch", 4, "adamw", True),
    Case("vit12", "executorch", 8, "sgd"),
    Case("vit65", "onnxruntime", 4, "adamw"),
    Case("vit65", "onnxruntime", 16, "sgd"),
    Case("vit65", "executorch", 4, "sgd"),
    Case("vit65", "executorch", 16, "adamw"),
    Case("pair", "onnxruntime", 4, "sgd", True),
    Case("pair", "onnxruntime", 8, "adamw"),
    Case("pair", "executorch", 4, "adamw"),
    Case("vit12", "torch", 4, "adamw", True),
    Case("vit65", "torch", 8, "sgd"),
)


def make_plan(case: Case) -> Plan:
    """One stage: the last block of each encoder. `vit65` is ViT-Tiny with 65 tokens and a small projection head."""
    if case.model == "vit65":
        plan = vit_tiny_plan("layerwise", tokens=65, layers=2)
        plan = plan.model_copy(update={"stages": (plan.stages[1].model_copy(update={"index": 0}),)})
    else:
        workload = WORKLOADS[case.model]
        plan = one_stage_plan(workload, "cut", None, workload.batch)
    settings = {"micro_batch": case.micro_batch, "optimizer": OPTIMIZERS[case.optimizer]}
    return plan.model_copy(update={"training": plan.training.model_copy(update=settings)})


def run(case: Case, folder: Path) -> dict[str, Any]:
    plan = make_plan(case)
    is_split = plan.model.objective.kind == "contrastive" and case.micro_batch < plan.training.batch_size
    (needs,) = stage_needs(plan, plan.training.batch_size - 1 if is_split else None)
    base = base_peaks(case.engine)["train_bytes"]
    predicted = needs.train_bytes(case.engine, case.micro_batch, plan.training.optimizer, base)
    measured = measure_stage(plan, 0, case.engine, folder)
    return {
        "model": case.model,
        "engine": case.engine,
        "micro_batch": case.micro_batch,
        "optimizer": case.optimizer,
        "is_fitted_to": case.is_fitted_to,
        "base_bytes": base,
        "predicted_bytes": predicted,
        "measured_bytes": measured["train_bytes"],
        "measured_fill_bytes": measured["fill_bytes"],
        "predicted_fill_bytes": needs.fill_bytes(case.engine, case.micro_batch, "fp32", base),
        "error": predicted / measured["train_bytes"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    console = Console()
    rows = []
    for case in CASES[:3] if is_quick else CASES:
        with TemporaryDirectory() as folder:
            rows.append(run(case, Path(folder)))
        found = rows[-1]
        console.print(
            f"{case.model}, {case.engine}, micro-batch {case.micro_batch}, {case.optimizer}: predicted "
            f"{found['predicted_bytes'] / MIB:.1f}, measured {found['measured_bytes'] / MIB:.1f} MiB",
            highlight=False,
        )
    table = Table(title=f"peak of the training process, MiB (bound: {100 * BOUND:.0f} %)")
    for heading in ("model", "engine", "micro-batch", "optimizer", "predicted", "measured", "error", "fitted to"):
        table.add_column(heading, justify="left" if heading in ("model", "engine", "optimizer") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            row["engine"],
            str(row["micro_batch"]),
            row["optimizer"],
            f"{row['predicted_bytes'] / MIB:.1f}",
            f"{row['measured_bytes'] / MIB:.1f}",
            f"{100 * row['error']:+.0f} %",
            "yes" if row["is_fitted_to"] else "",
        )
    console.print(table)
    worst = max(abs(row["error"]) for row in rows)
    console.print(f"largest error {100 * worst:.0f} %")
    if not is_quick:
        constants = {engine: overhead._asdict() for engine, overhead in OVERHEADS.items()}
        path = write_results("fit", "make bench-fit", rows, bound=BOUND, largest_error=worst, constants=constants)
        console.print(f"written to {path}")


if __name__ == "__main__":
    main()
