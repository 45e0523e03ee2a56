"""The demo's report: report.json with every number, report.png with the plots, report.html with both."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version
from typing import Any

from benchmarks.demo.report_page import draw, page
from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import hash_bytes
from lamina.figures.cost_report import RunCost, RunCosts
from lamina.wire import DeviceReport, RoundStatus, RunStatus


@dataclass(frozen=True)
class FinalModel:
    """Files of the assembled model, its accuracy by each, and the largest difference between their outputs."""

    files: dict[str, str]
    test_accuracy: dict[str, float]
    max_difference: float


@dataclass(frozen=True)
class Bounds:
    """What the run stands beside: the accuracy of a linear model that has all training data in one place, and the counted cost
    of the plan and of training the whole model at once for as many rounds."""

    linear_accuracy: float
    costs: RunCosts


def write_report(
    out: Path,
    settings: dict[str, object],
    manifest: Manifest,
    runs: Sequence[RunStatus],
    final: FinalModel,
    bounds: Bounds,
    seconds: float,
) -> dict[str, Any]:
    """Writes the three files into `out` and gives the content of report.json. `runs[0]` is the run of all modalities."""
    report = make_report(settings, manifest, runs, final, bounds, seconds)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, out / "report.png")
    (out / "report.html").write_text(page(report, (out / "report.png").read_bytes()))
    return report


def make_report(
    settings: dict[str, object],
    manifest: Manifest,
    runs: Sequence[RunStatus],
    final: FinalModel,
    bounds: Bounds,
    seconds: float,
) -> dict[str, Any]:
    main, *single = runs
    updates = [update for row in main.rounds for update in row.updates]
    return {
        "test_accuracy": last_accuracy(main.rounds),
        "single_modality_accuracy": dict(
            zip(manifest.plan.model.modalities, (last_accuracy(run.rounds) for run in single), strict=False)
        ),
        "stages": [_stage(manifest, main.rounds, index) for index in range(len(manifest.stages))],
        "devices": [device_row(name, updates) for name in sorted({update.device for update in updates})],
        "totals": {
            "rounds": len(main.rounds),
            "bytes_down": sum(update.report.bytes_down for update in updates),
            "bytes_up": sum(update.report.bytes_up for update in updates),
            "train_seconds": sum(update.report.train_seconds for update in updates),
            "wall_seconds": seconds,
        },
        "rounds": [
            {
                "stage": row.stage,
                "round": row.round,
                "test_accuracy": row.test_accuracy,
                "test_loss": row.test_loss,
                "train_loss": _mean_loss(row.updates),
            }
            for row in main.rounds
        ],
        "linear_accuracy": bounds.linear_accuracy,
        "compared": {"this_plan": _counted(bounds.costs.plan), "whole_model_at_once": _counted(bounds.costs.end_to_end)},
        "final_model": asdict(final),
        "final_weights_sha256": hash_bytes(json.dumps(sorted(main.weights.items())).encode()),
        "settings": settings,
        "versions": versions(),
    }


def _counted(cost: RunCost) -> dict[str, int]:
    """One device, all rounds: multiply-accumulates for each of its examples, and bytes of weights and updates."""
    return {
        "flops_per_example": cost.training_flops + (cost.fill_flops or 0),
        "bytes_down": cost.bytes_down + cost.new_prefix_bytes_down,
        "bytes_up": cost.bytes_up,
    }


def last_accuracy(rounds: Sequence[RoundStatus]) -> float | None:
    """Accuracy after the last evaluated round."""
    known = [row.test_accuracy for row in rounds if row.test_accuracy is not None]
    return known[-1] if known else None


def versions() -> dict[str, str]:
    """Versions of what took part, as installed."""
    found = {"python": python_version(), "machine": machine()}
    for name in ("lamina", "torch", "executorch", "onnxruntime-training-cpu", "onnx", "numpy", "fastapi", "httpx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _stage(manifest: Manifest, rounds: Sequence[RoundStatus], index: int) -> dict[str, Any]:
    mine = [row for row in rounds if row.stage == index]
    updates = [update for row in mine for update in row.updates]
    cost = manifest.stages[index].cost
    return {
        "index": index,
        "rounds": manifest.plan.stages[index].rounds,
        "active": list(manifest.plan.stages[index].active),
        "test_accuracy": last_accuracy(mine),
        "bytes_down": sum(update.report.bytes_down for update in updates),
        "bytes_up": sum(update.report.bytes_up for update in updates),
        "flops_per_sample": cost.flops_per_sample,
        "prefix_flops_per_sample": cost.prefix_flops_per_sample,
        "active_parameters": cost.active_parameters,
        "frozen_parameters": cost.frozen_parameters,
        "planned_bytes": dict(cost.planned_bytes),
    }


def device_row(name: str, updates: Sequence[DeviceReport]) -> dict[str, Any]:
    """What a device took for the whole run."""
    mine = [update for update in updates if update.device == name]
    reports = [update.report for update in mine]
    return {
        "name": name,
        "engine": mine[0].engine,
        "examples": reports[0].num_examples,
        "updates": len(reports),
        "peak_bytes": max(report.peak_bytes for report in reports),
        "bytes_down": sum(report.bytes_down for report in reports),
        "bytes_up": sum(report.bytes_up for report in reports),
        "train_seconds": sum(report.train_seconds for report in reports),
    }


def _mean_loss(updates: Sequence[DeviceReport]) -> float | None:
    examples = sum(update.report.num_examples for update in updates)
    return sum(update.report.loss * update.report.num_examples for update in updates) / examples if examples else None
