"""How long does one training step of one active block take on each engine, against eager PyTorch?

Question   CPU seconds of a step (gradients + AdamW) of one ViT-Tiny block with norm, projection and head, batch 16.
Method     One process, one thread, CPU time; the sides take turns, so that a noisy machine is noisy for all; median of the
           repeats. The engines run through the client's own code (checks included), eager through torch.optim.AdamW.
           `executorch` calls ExecuTorch through lamina's shim, `executorch_bindings` through the Python bindings of the wheel.
Not shown  Wall-clock with several threads; other processors; the cost of the feature cache.

    python -m benchmarks.engines [--repeats N]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device.workloads import CLASSES, vit_tiny_plan
from benchmarks.executorch_bindings import Bindings
from benchmarks.results_file import write_results
from edge_client.engines import Engine, load_engine
from edge_client.job import ProgramFile, SegmentFile, Tensor
from edge_client.train.optimizers import make_optimizer
from edge_client.train.stage_model import StageModel
from export.build import export_bundle
from export.graphs.cut import cut_stage, find_segments
from export.models.models import build_model
from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import ENGINES, LABEL, EngineName, Manifest
from lamina.plans.plan import AdamW, Plan

BATCH, STAGE = 16, 1
BOUND = 1.25


def measure(tokens: int, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each side: median, quartiles and the ratio to eager, in milliseconds of CPU time."""
    plan = vit_tiny_plan("layerwise", tokens=tokens, layers=2, batch_size=BATCH, optimizer=AdamW())
    manifest = export_bundle(plan, folder, ENGINES)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(BATCH, tokens, 192)).astype(np.float32),
        "label": rng.integers(0, CLASSES, BATCH),
    }
    sides: dict[str, Callable[[], None]] = {"eager": eager_step(plan, batch)}
    for name in ENGINES:
        sides[name] = engine_step(plan, stage_model(manifest, name, load_engine(name), folder), batch)
    sides["executorch_bindings"] = engine_step(plan, stage_model(manifest, "executorch", Bindings(), folder), batch)

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 3):
        for name, step in sides.items():
            start = time.process_time()
            step()
            if repeat >= 3:  # the first steps load programs and warm caches
                seconds[name].append(time.process_time() - start)
    eager = statistics.median(seconds["eager"])
    return [
        {
            "tokens": tokens,
            "side": name,
            "cpu_ms_median": 1e3 * statistics.median(values),
            "cpu_ms_quartiles": [1e3 * q for q in statistics.quantiles(values, n=4)[::2]],
            "ratio_to_eager": statistics.median(values) / eager,
            "repeats": repeats,
        }
        for name, values in seconds.items()
    ]


def eager_step(plan: Plan, batch: dict[str, np.ndarray]) -> Callable[[], None]:
    model = build_model(plan.model, plan.seed)
    module = cut_stage(find_segments(model, plan.model), plan.model, plan.stages[STAGE]).module
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    inputs = [torch.from_numpy(value) for value in batch.values()]

    def step() -> None:
        optimizer.zero_grad()
        loss, _ = module(*inputs)
        loss.backward()
        optimizer.step()

    return step


def stage_model(manifest: Manifest, name: EngineName, engine: Engine | Bindings, folder: Path) -> StageModel:
    """The stage as a device has it, trained by `engine` with the programs that were exported for `name`."""
    program = manifest.programs[manifest.stages[STAGE].train[name]]
    file = ProgramFile(
        path=str(blob_path(folder, program.blob)),
        blob=program.blob,
        role="train",
        weights=program.weights,
        inputs=tuple(Tensor(spec.name, spec.shape, spec.dtype) for spec in program.inputs),
        max_batch=program.max_batch,
    )
    segments = [
        SegmentFile(
            name=segment,
            path=str(blob_path(folder, manifest.initial_weights[segment])),
            tensors=tuple(Tensor(spec.name, spec.shape) for spec in manifest.segment(segment).tensors),
        )
        for segment in manifest.plan.stages[STAGE].active
    ]
    limits = {LABEL: CLASSES}
    model = StageModel("stage 1", segments, {"train": file}, limits, BATCH, lambda p: engine.load(Path(p.path), p))
    model.load_weights()
    return model


def engine_step(plan: Plan, model: StageModel, batch: dict[str, np.ndarray]) -> Callable[[], None]:
    optimizer = make_optimizer(plan.training.optimizer.model_dump(), model.parameters.size, 1e-3)

    def step() -> None:
        model.gradients(lambda indices: batch, range(BATCH))
        optimizer.step(model.parameters, model.gradient)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for tokens in (65, 197):
            rows += measure(tokens, repeats, Path(folder) / str(tokens))
    table = Table(title=f"training step of one ViT-Tiny block, batch {BATCH}, CPU time, 1 thread (bound {BOUND} x eager)")
    for heading in ("tokens", "side", "median ms", "quartiles ms", "x eager"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["cpu_ms_quartiles"]
        table.add_row(
            str(row["tokens"]),
            row["side"],
            f"{row['cpu_ms_median']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['ratio_to_eager']:.2f}",
        )
    console = Console()
    console.print(table)
    path = write_results("engines", "make bench-engines", rows, batch=BATCH, threads=1, bound_ratio=BOUND)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
