"""`lamina export`: turn a plan into a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from lamina.manifest import Manifest


def export(
    plan: Annotated[Path, typer.Argument(help="Plan as a JSON file (docs/plan.md has its keys).")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; empty, or holding this very bundle.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Engine to export for: executorch, onnxruntime or torch. Repeat it for more than one. "
            "Default: executorch and onnxruntime."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Programs to lower at the same time, about 1 GB of memory each. Default: one per core."),
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Data file as devices have it. For a plan with an int8 prefix, its first 64 training examples show how far "
            "int8 moves the features of the initial weights; without it, random inputs do. Changes no program.",
        ),
    ] = None,
) -> None:
    """Write the programs and initial weights of a plan as a bundle, and show what each stage costs a device.

    Every program is run once and compared with PyTorch before it is written. Lowered programs are kept in
    ~/.cache/lamina/programs (or $LAMINA_CACHE), so a repeated or interrupted export continues where it was.
    """
    from typing import get_args

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from export.bundle import export_bundle
    from lamina.errors import ConfigError
    from lamina.manifest import EngineName
    from lamina.plan import Plan

    chosen = engine or ["executorch", "onnxruntime"]
    unknown = [name for name in chosen if name not in get_args(EngineName)]
    if unknown:
        raise ConfigError(f"unknown engine {unknown[0]!r}; known: {', '.join(get_args(EngineName))}")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = {phase: progress.add_task(phase, total=None) for phase in ("trace", "lower")}

        def show(phase: str, done: int, total: int) -> None:
            progress.update(tasks[phase], completed=done, total=total)

        manifest = export_bundle(Plan.from_file(plan), out, chosen, on_progress=show, workers=jobs, sample=sample)
    console.print(_cost_table(manifest))
    for line in _prefix_lines(manifest):
        console.print(line, soft_wrap=True)
    console.print(
        f"{out}: {len(manifest.programs)} program files, {sum(manifest.blobs.values()):,} bytes in all", soft_wrap=True
    )


def _prefix_lines(manifest: "Manifest") -> list[str]:
    """What an int8 prefix does to the features at its end: the largest error over the modalities."""
    return [
        f"int8 prefix on {engine}: features off by {100 * max(errors.values()):.2f} % at most, measured on the initial weights "
        f"and {_named(manifest.prefix_errors_on)}"
        for engine, errors in manifest.prefix_errors.items()
    ]


def _named(measured_on: str) -> str:
    return measured_on if " " in measured_on else f"data {measured_on[:12]}"


def _cost_table(manifest: "Manifest") -> "Table":
    """One row for each stage: what it costs one device."""
    from rich import box
    from rich.table import Table

    engines = " / ".join(manifest.engines)
    training = manifest.plan.training
    pieces = f" in micro-batches of {training.micro_batch}" if training.samples_in_memory < training.batch_size else ""
    table = Table(
        title=f"{manifest.plan.name}: {manifest.plan.strategy}, batch {training.batch_size}{pieces}",
        caption=f"planned and programs: {engines}",
        box=box.SIMPLE,
        pad_edge=False,
    )
    headings = (
        "stage",
        "active",
        "frozen",
        "MFLOPs\n/sample",
        "MiB\nplanned",
        "KiB down\n/round",
        "KiB up\n/round",
        "KiB\nprograms",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for stage in manifest.stages:
        cost = stage.cost
        table.add_row(
            str(stage.index),
            f"{cost.active_parameters:,}",
            f"{cost.frozen_parameters:,}",
            f"{cost.flops_per_sample / 1e6:.2f}",
            " / ".join(f"{cost.planned_bytes[engine] / 2**20:.1f}" for engine in manifest.engines),
            f"{cost.round_bytes_down / 1024:.1f}",
            f"{cost.round_bytes_up / 1024:.1f}",
            " / ".join(f"{cost.program_bytes[engine] / 1024:.0f}" for engine in manifest.engines),
        )
    return table
