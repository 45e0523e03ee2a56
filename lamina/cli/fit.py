"""`lamina fit`: settings with which a plan fits the memory of a device."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from lamina.cli.plan_options import Classes, changes, check_plan_file
from lamina.errors import ConfigError
from lamina.names import ENGINES

_MIB = 1 << 20


def fit(
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN|FACTORY", help="A plan file (.toml, .yaml, .json), or package.module:function."),
    ],
    memory_mb: Annotated[
        float, typer.Option(help="Most MiB that all processes of the device may hold at one time, as the kernel counts them.")
    ],
    engine: Annotated[str, typer.Option(help=f"Runtime of the device: {', '.join(ENGINES)}.")] = "onnxruntime",
    disk_mb: Annotated[
        float | None, typer.Option(help="Most MB of stored features; needs --examples. Without it, the disk is no limit.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples on one device, training and test together.")] = 0,
    classes: Classes = None,
    write: Annotated[Path | None, typer.Option(help="Write the plan with the chosen settings to this file.")] = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="Export the stage that needs most and train it once in a fresh process; if it takes more than predicted and "
            "no longer fits, go on to the next choice. Takes about a minute."
        ),
    ] = True,
) -> None:
    """Choose micro-batch, layers per stage, stored features and prefix precision so that a plan fits a device.

    Prefers what costs nothing: the plan's own layers per stage, float32, the largest micro-batch. A budget that cannot be met
    is refused with the smallest one that would do.
    """
    check_plan_file(plan)
    from rich.console import Console
    from rich.table import Table

    from benchmarks.device.job_alone import base_peaks, measure_stage
    from export.fit.fit import Base, fits
    from export.plans.resolve import resolve

    chosen = next((known for known in ENGINES if known == engine), None)
    if chosen is None:
        raise ConfigError(f"there is no engine {engine!r}; known: {', '.join(ENGINES)}")
    if disk_mb is not None and not examples:
        raise ConfigError("--disk-mb needs --examples, the number of examples on one device: features are stored for each")
    wanted = resolve(plan, changes(classes=classes)).plan
    console = Console(stderr=True, highlight=False)
    console.print(f"measuring the device's processes with {engine}, then tracing {len(wanted.stages)} stages")
    base = Base(**base_peaks(chosen))
    budget = int(memory_mb * _MIB)
    disk = None if disk_mb is None else int(disk_mb * 10**6)

    def on_progress(what: str, done: int, total: int) -> None:
        console.print(f"  {what} {done} of {total}")

    for choice in fits(wanted, chosen, base, budget, disk, examples, on_progress):
        training, measured = choice.plan.training, None
        if measure:
            console.print(
                f"micro-batch {training.micro_batch}, {choice.peak_bytes / _MIB:.0f} MiB predicted; "
                f"exporting stage {choice.stage} to measure it"
            )
            with TemporaryDirectory() as folder:
                peaks = measure_stage(choice.plan, choice.stage, chosen, Path(folder))
            measured = base.supervisor_bytes + max(base.talk_bytes, *peaks.values())
            if measured > budget:
                console.print(f"  measured {measured / _MIB:.0f} MiB: too much, trying the next choice")
                continue
        table = Table(title=f"{wanted.name} on {engine} within {memory_mb:g} MiB")
        table.add_column("setting")
        table.add_column("value", justify="right")
        rows = {
            "micro-batch (of a batch of " + str(training.batch_size) + ")": str(training.micro_batch),
            "layers per stage": str(choice.layers_per_stage or "as planned"),
            "stages": str(len(choice.plan.stages)),
            "stored features": training.features.encoding,
            "examples stored": f"{100 * choice.stored_share:.0f} %",
            "features on disk, MB": f"{choice.disk_bytes / 1e6:.1f}",
            "prefix precision": training.prefix_precision,
            "predicted peak, MiB": f"{choice.peak_bytes / _MIB:.1f}",
            "measured peak, MiB": "not asked" if measured is None else f"{measured / _MIB:.1f}",
        }
        for name, value in rows.items():
            table.add_row(name, value)
        Console().print(table)
        if write is not None:
            write.write_bytes(choice.plan.to_json())
            console.print(f"written to {write}")
        return
    raise ConfigError(
        f"every choice that should fit {memory_mb:g} MiB took more when it was measured; give a few MiB more, or another engine"
    )
