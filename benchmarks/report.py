"""The demo's report: report.json with every number, report.png with the plots, report.html with both."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from platform import machine, python_version
from typing import Any

from lamina.manifest import Manifest
from lamina.tensors import hash_bytes
from lamina.wire import DeviceReport, RoundStatus, RunStatus

NOTES = (
    "flops_per_sample counts multiply-accumulates: 3 x the forward pass of what a stage trains, from cached features; "
    "prefix_flops_per_sample is paid once per sample and stage at most.",
    "planned_bytes is weights + gradients + optimiser moments + activations of one batch. For ExecuTorch the activations are "
    "the planned arena; for the others they are the live tensors of the graph, which the runtime exceeds by its own workspace.",
    "peak_bytes is the peak resident set of the whole client process, as the kernel counts it. The ExecuTorch engine's "
    "Python bindings import torch, which is most of its figure.",
    "bytes_down and bytes_up are bodies of HTTP messages, as the devices report them with their updates.",
)


@dataclass(frozen=True)
class FinalModel:
    """Files of the assembled model, its accuracy by each, and the largest difference between their outputs."""

    files: dict[str, str]
    test_accuracy: dict[str, float]
    max_difference: float


def write_report(
    out: Path, settings: dict[str, object], manifest: Manifest, runs: Sequence[RunStatus], final: FinalModel, seconds: float
) -> dict[str, Any]:
    """Writes the three files into `out` and gives the content of report.json. `runs[0]` is the run of all modalities."""
    report = make_report(settings, manifest, runs, final, seconds)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, out / "report.png")
    (out / "report.html").write_text(_page(report, (out / "report.png").read_bytes()))
    return report


def make_report(
    settings: dict[str, object], manifest: Manifest, runs: Sequence[RunStatus], final: FinalModel, seconds: float
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
        "final_model": asdict(final),
        "final_weights_sha256": hash_bytes(json.dumps(sorted(main.weights.items())).encode()),
        "settings": settings,
        "versions": versions(),
        "notes": list(NOTES),
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


def draw(report: dict[str, Any], path: Path) -> None:
    """Three plots side by side: accuracy per round with stage boundaries, memory and bytes per device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=(2, 1, 1), layout="constrained")
    rounds, devices = report["rounds"], report["devices"]
    steps = range(1, len(rounds) + 1)
    left.plot(steps, [row["test_accuracy"] for row in rounds], marker="o", color="tab:blue", label="all modalities")
    for color, (name, accuracy) in zip(
        ("tab:orange", "tab:green", "tab:red"), report["single_modality_accuracy"].items(), strict=False
    ):
        left.axhline(accuracy, linestyle="--", color=color, label=f"{name} alone, at the end")
    for step, (before, after) in enumerate(pairwise(rounds), start=1):
        if before["stage"] != after["stage"]:
            left.axvline(step + 0.5, color="0.8", linewidth=1)
    for index in sorted({row["stage"] for row in rounds}):
        first = next(step for step, row in zip(steps, rounds, strict=True) if row["stage"] == index)
        left.annotate(f"stage {index}", (first - 0.4, 1.0), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
    left.set(xlabel="round", ylabel="test accuracy", xlim=(0.5, len(rounds) + 0.5), ylim=(0, 1))
    left.legend(loc="lower right")

    names = [f"{device['name']}\n{device['engine']}" for device in devices]
    places = range(len(devices))
    middle.bar(places, [device["peak_bytes"] / 2**20 for device in devices], color="tab:purple")
    middle.set(title="peak memory of the client process", ylabel="MiB")
    middle.set_xticks(places, names, fontsize=7)
    right.bar([p - 0.2 for p in places], [d["bytes_down"] / 1e6 for d in devices], 0.4, label="down", color="tab:cyan")
    right.bar([p + 0.2 for p in places], [d["bytes_up"] / 1e6 for d in devices], 0.4, label="up", color="tab:olive")
    right.set(title="bytes moved", ylabel="MB")
    right.set_xticks(places, names, fontsize=7)
    right.margins(y=0.25)  # room for the legend above the bars
    right.legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _page(report: dict[str, Any], png: bytes) -> str:
    def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_show(row.get(column)))}</td>" for column in columns) + "</tr>" for row in rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"

    single = "".join(
        f"<li>{html.escape(name)} alone: {value:.3f}</li>" for name, value in report["single_modality_accuracy"].items()
    )
    stages = [{**stage, **{f"planned ({e})": b for e, b in stage["planned_bytes"].items()}} for stage in report["stages"]]
    planned = [key for key in stages[0] if key.startswith("planned (")]
    model = [
        {"format": kind, "file": file, "test_accuracy": report["final_model"]["test_accuracy"].get(kind)}
        for kind, file in report["final_model"]["files"].items()
    ]
    stage_columns = ["index", "rounds", "test_accuracy", "active_parameters", "frozen_parameters", "flops_per_sample"]
    device_columns = ["name", "engine", "examples", "updates", "peak_bytes", "bytes_down", "bytes_up", "train_seconds"]
    settings = "".join(f"<li>{html.escape(k)}: {html.escape(str(v))}</li>" for k, v in report["settings"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>lamina demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222 }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ width: 100% }}
small {{ color: #555 }}
</style>
<h1>{html.escape(str(report["settings"]["data"]))}, {html.escape(str(report["settings"]["strategy"]))}</h1>
<p>Test accuracy <b>{_show(report["test_accuracy"])}</b></p><ul>{single}</ul>
<img alt="accuracy per round, memory and bytes per device" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Stages</h2>{table(stages, [*stage_columns, *planned, "bytes_down", "bytes_up"])}
<h2>Devices</h2>{table(report["devices"], device_columns)}
<h2>Final model</h2>{table(model, ["format", "file", "test_accuracy"])}
<p>Largest difference between the outputs of the formats: {report["final_model"]["max_difference"]:.1e}</p>
<h2>Settings</h2><ul>{settings}</ul>
<p><small>{"<br>".join(html.escape(note) for note in report["notes"])}</small></p>
</html>
"""


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
