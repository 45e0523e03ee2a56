"""How much memory does training one block of a 12-block ViT-Tiny take, and what does cutting the graph bring?

Question   Peak resident set of the whole process, batch 16, 197 tokens, SGD with momentum 0.9 and AdamW, for
             full     all 12 blocks are trained: end-to-end training
             flagged  the whole graph, but only the last block, norm, projection and head are trained
             cut      a graph of only those active parts, fed from cached features: what lamina exports
Method     A fresh process for each case; VmHWM as the kernel reports it; engine cases import what a device imports.
           `planned` is the program's activation_bytes in the manifest, 0 where lamina plans none (flagged graphs, but for the
           arena that ExecuTorch plans by itself); ONNX Runtime needs more than the live tensors that are counted there.
Not shown  Filling the feature cache (one frozen layer over small chunks); smaller micro-batches.

    python -m benchmarks.memory [--quick]        --quick: 3 blocks instead of 12, to try the script
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.results_file import write_results
from benchmarks.vit_tiny import CLASSES, LAYERS, TOKENS, vit_tiny_plan
from export.bundle import export_bundle
from export.cut import cut_stage, example_inputs, find_segments
from export.decompositions import LEAN
from export.models import build_model
from export.trace import forward_graph, trace_function
from export.worker import lower
from lamina.bundle import blob_path
from lamina.manifest import EngineName, Program

BATCH = 16
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "executorch")
KINDS = ("full", "flagged", "cut")
OPTIMIZERS = ("sgd", "adamw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    layers = 3 if parser.parse_args().quick else LAYERS
    console = Console()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        for side in ("eager", *ENGINES):
            for kind in KINDS:
                console.print(f"{side}, {kind}: preparing", highlight=False)
                case = make_case(side, kind, layers, Path(scratch))
                for optimizer in OPTIMIZERS:
                    rows.append(run_case({**case, "optimizer": optimizer}, Path(scratch)))
                    console.print(f"  {optimizer}: {rows[-1]['peak_bytes'] / 2**20:.0f} MiB", highlight=False)
    for row in rows:
        row["below_full_on_the_same_side"] = _peak(rows, row["side"], "full", row["optimizer"]) / row["peak_bytes"]
        row["below_full_in_eager_pytorch"] = _peak(rows, "eager", "full", row["optimizer"]) / row["peak_bytes"]
    console.print(_table(rows, layers))
    command = "make bench-memory" if layers == LAYERS else "python -m benchmarks.memory --quick"
    name = "memory" if layers == LAYERS else "memory-quick"
    console.print(f"written to {write_results(name, command, rows, batch=BATCH, tokens=TOKENS, layers=layers)}")


def make_case(side: str, kind: str, layers: int, folder: Path) -> dict[str, Any]:
    """The case as the child process reads it; engine cases get their program file."""
    plan = vit_tiny_plan("end_to_end" if kind == "full" else "layerwise", layers=layers, batch_size=BATCH)
    case: dict[str, Any] = {
        "side": side,
        "kind": kind,
        "batch": BATCH,
        "classes": CLASSES,
        "model": plan.model.model_dump(mode="json"),
        "planned_activation_bytes": None,
    }
    if side == "eager":
        return case
    engine: EngineName = "executorch" if side == "executorch" else "onnxruntime"
    if kind == "flagged":
        file, program, trained = flagged_program(engine, layers, folder)
    else:
        bundle = folder / f"{side}-{kind}"
        manifest = export_bundle(plan, bundle, (engine,))
        program = manifest.programs[manifest.stages[-1].train[engine]]
        file, trained = blob_path(bundle, program.blob), len(program.weights)
    return {
        **case,
        "file": str(file),
        "program": program.model_dump(mode="json"),
        "trained": trained,
        "planned_activation_bytes": program.activation_bytes,
    }


def flagged_program(engine: EngineName, layers: int, folder: Path) -> tuple[Path, Program, int]:
    """What lamina does not export: a graph that still holds the frozen layers, and differentiates only the active ones.

    Gives the file, its description, and the number of trained weights, which come last.
    """
    plan = vit_tiny_plan("end_to_end", layers=layers, batch_size=BATCH)
    active = vit_tiny_plan("layerwise", layers=layers).stages[-1].active
    segments = find_segments(build_model(plan.model, 0), plan.model)
    cut = cut_stage(segments, plan.model, plan.stages[0])
    is_trained = [spec.name.split("/")[0] in active for spec in cut.weights]
    trained = sum(is_trained)
    assert is_trained == sorted(is_trained), "the trained weights must be the last ones"
    example = example_inputs(plan.model, cut.inputs, 2)
    forward = forward_graph(cut.module, example, BATCH)
    run = forward.module()

    def step(weights: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        leaves = [weight.detach().requires_grad_(flag) for weight, flag in zip(weights, is_trained, strict=True)]
        loss, correct = run(tuple(leaves), inputs)
        return (loss.detach(), correct, *torch.autograd.grad(loss, leaves[-trained:]))

    weights = tuple(value.detach() for value in cut.module.parameters())
    symbolic = [node.meta["val"] for node in forward.graph.nodes if node.op == "placeholder"]
    arguments = (tuple(symbolic[: len(weights)]), tuple(symbolic[len(weights) :]))
    graph = make_fx(step, decomposition_table=LEAN, tracing_mode="symbolic")(*arguments)
    lowered = lower(engine, trace_function(lambda w, i: graph(w, i), weights, example, BATCH))
    file = folder / f"flagged.{engine}"
    file.write_bytes(lowered.data)
    program = Program(
        engine=engine,
        role="train",
        blob="0" * 64,
        weights=tuple(tuple(value.shape) for value in weights),
        inputs=cut.inputs,
        max_batch=BATCH,
        activation_bytes=lowered.arena_bytes or 0,
    )
    return file, program, trained


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.memory_case", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case['side']}, {case['kind']} failed:\n{done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    kept = {key: case[key] for key in ("side", "kind", "optimizer", "planned_activation_bytes")}
    return {**kept, **measured}


def _peak(rows: list[dict[str, Any]], side: str, kind: str, optimizer: str) -> int:
    return next(r["peak_bytes"] for r in rows if (r["side"], r["kind"], r["optimizer"]) == (side, kind, optimizer))


def _table(rows: list[dict[str, Any]], layers: int) -> Table:
    table = Table(title=f"peak of the whole process, ViT-Tiny of {layers} blocks, {TOKENS} tokens, batch {BATCH}")
    for heading in ("side", "graph", "optimizer", "peak MiB", "planned MiB", "full / this", "eager full / this", "step ms"):
        table.add_column(heading, justify="left" if heading in ("side", "graph", "optimizer") else "right")
    for row in rows:
        planned = row["planned_activation_bytes"]
        table.add_row(
            row["side"],
            row["kind"],
            row["optimizer"],
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{planned / 2**20:.0f}" if planned else "-",
            f"{row['below_full_on_the_same_side']:.2f}",
            f"{row['below_full_in_eager_pytorch']:.2f}",
            f"{1e3 * row['cpu_seconds_per_step']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
