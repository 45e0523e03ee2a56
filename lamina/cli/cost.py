"""`lamina cost`: what a plan costs a device, before anything is exported."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.plan_options import Classes, FreezeStems, LayersPerStage, Rounds, Strategy, changes, check_plan_file

if TYPE_CHECKING:
    from rich.table import Table

    from lamina.figures.cost_report import CostReport, RunCosts, StageCosts, StepCost

_BYTE_UNITS = (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30))
_FLOP_UNITS = (("MFLOPs", 10**6), ("GFLOPs", 10**9), ("TFLOPs", 10**12))


def cost(
    plan: Annotated[str, typer.Argument(help="Plan file (docs/plan.md has its keys), or a factory `package.module:function`.")],
    frozen_weights: Annotated[
        str,
        typer.Option(
            help="resident: devices stay, and keep the frozen segments. downloaded: every round has new devices, each of which "
            "fetches the frozen segments too."
        ),
    ] = "resident",
    layer_budget: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Depth dropout: layers of an encoder in use in a round, the active ones among them; the first always is, the "
            "other frozen ones are drawn. Figures are the mean over draws. Default: all layers.",
        ),
    ] = None,
    strategy: Strategy = None,
    layers_per_stage: LayersPerStage = None,
    rounds: Rounds = None,
    classes: Classes = None,
    freeze_stems: FreezeStems = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the whole report, exact, to this file.")] = None,
) -> None:
    """Show what each stage of a plan costs a device, and how much that is less than end-to-end training.

    Nothing is exported, traced or trained: parameters and FLOPs are read off the modules. FLOPs are multiply-accumulates
    for one sample, 3 x the forward pass of trained segments and 1 x that of frozen ones. Every table stands with the heads
    (projections, task head) and without them. docs/cost.md has the conventions, and published results as a check.
    """
    check_plan_file(plan)
    from rich.console import Console

    from export.cost.estimate import plan_costs
    from export.plans.resolve import resolve
    from lamina.errors import ConfigError
    from lamina.figures.cost_report import Accounting
    from lamina.files import write_durably

    if frozen_weights not in ("resident", "downloaded"):
        raise ConfigError(f"--frozen-weights is {frozen_weights!r}; choose resident or downloaded")
    resolved = resolve(
        plan,
        changes(
            strategy=strategy,
            layers_per_stage=layers_per_stage,
            rounds=rounds,
            classes=classes,
            freeze_stems=freeze_stems,
        ),
    )
    training = resolved.plan.training
    report = plan_costs(
        resolved.plan,
        resolved.model,
        Accounting(
            frozen_weights="resident" if frozen_weights == "resident" else "downloaded",
            layer_budget=layer_budget,
            download_encoding=training.download_encoding,
            upload_encoding=training.upload_encoding,
        ),
    )
    if json is not None:
        write_durably(json, report.to_json())
    console = Console(highlight=False)
    console.print(_stage_table(report, "with heads", lambda stage: stage.with_heads))
    console.print(_stage_table(report, "without heads", lambda stage: stage.without_heads))
    console.print(_run_table(report))
    for line in _remarks(report):
        console.print(line, soft_wrap=True)
    if json is not None:
        console.print(f"written to {json}", soft_wrap=True)


def _stage_table(report: "CostReport", title: str, part: "Callable[[StageCosts], StepCost]") -> "Table":
    """One row for each stage, and end-to-end training below."""
    steps = [part(stage) for stage in (*report.stages, report.end_to_end)]
    flops, flop = _unit(max(step.flops_per_sample for step in steps), _FLOP_UNITS)
    size, byte = _unit(max(max(step.model_bytes, step.round_bytes_down) for step in steps), _BYTE_UNITS)
    table = _table(
        f"{report.name}: {report.strategy}, one device, {title}\nmillions of parameters, {size}, {flops} for one sample",
        "stage",
        "rounds",
        "active\nparam.",
        "frozen\nparam.",
        "active\nsize",
        "frozen\nsize",
        "train\nFLOPs",
        "with\nprefix",
        "fill\nonce",
        "round\ndown",
        "round\nup",
    )
    for stage, step in zip((*report.stages, report.end_to_end), steps, strict=True):
        table.add_row(
            "all" if stage is report.end_to_end else str(stage.index),
            str(stage.rounds),
            _number(step.active_parameters / 1e6),
            _number(step.frozen_parameters / 1e6),
            _number(step.active_bytes / byte),
            _number(step.frozen_bytes / byte),
            _number(step.training_flops_per_sample / flop),
            _number(step.flops_per_sample / flop),
            "-" if step.fill_flops_per_sample is None else _number(step.fill_flops_per_sample / flop),
            _number(step.round_bytes_down / byte),
            _number(step.round_bytes_up / byte),
            end_section=stage is report.stages[-1],
        )
    return table


def _run_table(report: "CostReport") -> "Table":
    """Totals of one device over the run, beside end-to-end training for as many rounds."""
    rounds, epochs = report.end_to_end.rounds, report.local_epochs
    table = _table(
        f"over {rounds} rounds of {epochs} local epoch{'s' if epochs > 1 else ''}; FLOPs for one sample",
        "",
        "plan",
        "end to end",
        "times\nless",
        "without\nheads",
        "end to end",
        "times\nless",
    )
    rows: tuple[tuple[str, Callable[[RunCosts], tuple[int | None, int, float | None]]], ...] = (
        ("round traffic", lambda r: (r.plan.bytes_moved, r.end_to_end.bytes_moved, r.savings.communication)),
        (
            "+ prefix once",
            lambda r: (
                r.plan.bytes_moved + r.plan.new_prefix_bytes_down,
                r.end_to_end.bytes_moved,
                r.savings.communication_with_prefix,
            ),
        ),
        ("FLOPs", lambda r: (r.plan.flops, r.end_to_end.flops, r.savings.flops)),
        ("FLOPs, cached", lambda r: (r.plan.training_flops, r.end_to_end.flops, r.savings.flops_cached_steps)),
        ("+ filling it", lambda r: (r.plan.cached_flops, r.end_to_end.flops, r.savings.flops_cached)),
    )
    for name, read in rows:
        units = _FLOP_UNITS if "FLOPs" in name or "fill" in name else _BYTE_UNITS
        cells = []
        for mine, whole, ratio in (read(report.with_heads), read(report.without_heads)):
            is_given = mine is not None and ratio is not None
            cells += [
                _with_unit(mine, units) if is_given else "-",
                _with_unit(whole, units),
                f"{ratio:.2f}" if is_given else "-",
            ]
        table.add_row(name, *cells)
    return table


def _remarks(report: "CostReport") -> list[str]:
    """What a reader of the tables could get wrong."""
    lines = []
    accounting = report.accounting
    if (accounting.download_encoding, accounting.upload_encoding) != ("fp32", "fp32"):
        ratio = report.with_heads.savings.communication_against_fp32
        lines.append(
            f"traffic is in {accounting.download_encoding} down and {accounting.upload_encoding} up on both sides"
            + (f"; against end-to-end training in fp32 it is {ratio:.2f} times less" if ratio is not None else "")
        )
    if accounting.layer_budget is not None:
        lines.append(
            f"depth dropout to {accounting.layer_budget} layers: mean over the draws, which no feature cache can follow"
        )
    if constants := sum(segment.constants for segment in report.segments):
        lines.append(f"{constants:,} parameters have requires_grad=False: never trained, sent to each device once")
    if report.unused_parameters:
        lines.append(f"{report.unused_parameters:,} parameters belong to no segment: stored, never run or sent")
    lines += [
        f"{segment.name}: torch's counter does not know {', '.join(segment.uncounted)}, so its FLOPs are too low"
        for segment in report.segments
        if segment.uncounted
    ]
    return lines


def _table(title: str, *headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _unit(largest: int, units: tuple[tuple[str, int], ...]) -> tuple[str, int]:
    """The largest unit that the number has at least one of, else the smallest."""
    return next(((name, size) for name, size in reversed(units) if largest >= size), units[0])


def _with_unit(value: int | None, units: tuple[tuple[str, int], ...]) -> str:
    name, size = _unit(value or 0, units)
    return f"{_number((value or 0) / size)} {name.removesuffix('FLOPs')}"


def _number(value: float) -> str:
    """Four digits, or more before the point."""
    if value >= 1000 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{next(digits for digits, bound in ((1, 100), (2, 10), (3, 0)) if value >= bound)}f}"
