"""What a person sees of a report: the plots, and one page of HTML that stands alone. Figures are in MB, MiB and millions."""

import base64
import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


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


Column = tuple[str, str, float, int]
"""Heading, key in the report, what the value is divided by, and digits after the point."""

_STAGE: tuple[Column, ...] = (
    ("stage", "index", 1, 0),
    ("rounds", "rounds", 1, 0),
    ("test accuracy", "test_accuracy", 1, 3),
    ("trained values", "active_parameters", 1, 0),
    ("frozen values", "frozen_parameters", 1, 0),
    ("M FLOPs a sample", "flops_per_sample", 1e6, 1),
    ("MB down", "bytes_down", 1e6, 2),
    ("MB up", "bytes_up", 1e6, 2),
)
_DEVICE: tuple[Column, ...] = (
    ("device", "name", 1, 0),
    ("engine", "engine", 1, 0),
    ("examples", "examples", 1, 0),
    ("updates", "updates", 1, 0),
    ("peak MiB", "peak_bytes", 2**20, 0),
    ("MB down", "bytes_down", 1e6, 2),
    ("MB up", "bytes_up", 1e6, 2),
    ("seconds", "train_seconds", 1, 1),
)
_MODEL: tuple[Column, ...] = (("format", "format", 1, 0), ("file", "file", 1, 0), ("test accuracy", "test_accuracy", 1, 3))
_ACCURACY: tuple[Column, ...] = (("what was trained", "name", 1, 0), ("test accuracy", "test_accuracy", 1, 3))
_COST: tuple[Column, ...] = (
    ("plan", "name", 1, 0),
    ("M FLOPs an example", "flops_per_example", 1e6, 0),
    ("MB down", "bytes_down", 1e6, 2),
    ("MB up", "bytes_up", 1e6, 2),
)
_NOTES = (
    "FLOPs are multiply-accumulates. A sample of a stage costs 3 forward passes of what the stage trains, from stored "
    "features; an example of a run costs that in every round, and one pass of each layer after it is frozen.",
    "Values are numbers of the model: trained in a stage, or frozen before it.",
    "Peak is the resident memory of all processes of a device, as the kernel counts it, files that it maps included.",
    "MB down and up of a stage are bodies of HTTP messages of all devices, as they report them; those of a device are for the "
    "whole run. The comparison counts weights and updates of one device, and no programs or messages.",
)


def page(report: dict[str, Any], png: bytes) -> str:
    """The report as HTML with everything in it."""
    settings = report["settings"]
    planned = tuple((f"planned MiB, {engine}", engine, 2**20, 1) for engine in report["stages"][0]["planned_bytes"])
    stages = [{**stage, **stage["planned_bytes"]} for stage in report["stages"]]
    files = report["final_model"]["files"]
    right = report["final_model"]["test_accuracy"]
    model = [{"format": kind, "file": file, "test_accuracy": right.get(kind)} for kind, file in files.items()]
    items = "".join(f"<li>{html.escape(key)}: {html.escape(_text(value))}</li>" for key, value in settings.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>lamina demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right }}
th {{ vertical-align: bottom }}
th:first-child, td:first-child {{ text-align: left }}
img {{ width: 100% }}
small {{ color: #555 }}
</style>
<h1>{html.escape(str(settings["data"]))}, {html.escape(str(settings["strategy"]))}</h1>
<p>Test accuracy <b>{_cell(report["test_accuracy"], 1, 3)}</b></p>
<img alt="accuracy per round, memory and bytes per device" src="data:image/png;base64,{base64.b64encode(png).decode()}">
<h2>Beside it</h2>{_table(_accuracies(report), _ACCURACY)}{_table(_costs(report), _COST)}
<p>For the accuracy of the whole model at once: <code>lamina demo --strategy end_to_end</code>.</p>
<h2>Stages</h2>{_table(stages, (*_STAGE, *planned))}
<h2>Devices</h2>{_table(report["devices"], _DEVICE)}
<h2>Final model</h2>{_table(model, _MODEL)}
<p>Largest difference between the outputs of the formats: {report["final_model"]["max_difference"]:.1e}</p>
<h2>Settings</h2><ul>{items}</ul>
<p><small>{"<br>".join(html.escape(note) for note in _NOTES)}</small></p>
</html>
"""


def _accuracies(report: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [{"name": "all modalities, federated", "test_accuracy": report["test_accuracy"]}]
    rows += [
        {"name": f"{name} alone, federated", "test_accuracy": value}
        for name, value in report["single_modality_accuracy"].items()
    ]
    return [*rows, {"name": "a linear model with all data in one place", "test_accuracy": report["linear_accuracy"]}]


def _costs(report: dict[str, Any]) -> list[Row]:
    names = {"this_plan": "this plan, one device", "whole_model_at_once": "the whole model at once, one device"}
    return [{"name": name, **report["compared"][key]} for key, name in names.items()]


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading, *_ in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(key), unit, digits)}</td>" for _, key, unit, digits in columns) + "</tr>"
        for row in rows
    )
    return f"<div><table><tr>{head}</tr>{body}</table></div>"


def _cell(value: Any, unit: float, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value / unit:,.{digits}f}" if isinstance(value, int | float) else html.escape(str(value))


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
