"""`lamina bench`: measure what on-device training costs on this machine, and put machines side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lamina.cli.progress import telling
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.device.prepare import Order

Name = TypeVar("Name", bound=str)

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure memory, CPU time and energy of on-device training on this machine, and compare machines. "
    "docs/memory.md says what each number means.",
)

Workloads = Annotated[
    str | None,
    typer.Option(
        help="Reference workloads, separated by commas: vit12 (ViT-Tiny, 12 blocks, 197 tokens, batch 16), pair (the same "
        "with a 6-block text encoder, contrastive, batch 64), tiny (seconds per case). Default: vit12, or all of the bundle."
    ),
]
Engines = Annotated[
    str | None,
    typer.Option(help="Separated by commas: eager (PyTorch itself), onnxruntime, executorch, torch. Default: what is there."),
]
Cases = Annotated[
    str | None,
    typer.Option(
        "--case",
        help="Separated by commas: full, flagged, cut, cut+cache, +micro, +fill, +int8 (docs/memory.md). Default: all.",
    ),
]
Batches = Annotated[str | None, typer.Option(help="Batch sizes, separated by commas. Default: that of the workload.")]
Stages = Annotated[
    str | None,
    typer.Option(
        help="Which block is trained, separated by commas: 0, 1, ... from the input, each with all blocks below it frozen, "
        "or last. Default: last."
    ),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Samples in memory at a time in the cases +micro, +fill and +int8; must divide the batch."),
]


@bench.command()
def memory(
    workload: Workloads = None,
    engine: Engines = None,
    case: Cases = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Folder that `lamina bench prepare` wrote on another machine: then no torch is needed here."),
    ] = None,
    batch: Batches = None,
    stage: Stages = None,
    micro_batch: MicroBatch = None,
    optimizer: Annotated[str, typer.Option(help="Optimisers, separated by commas: sgd (momentum 0.9), adamw.")] = "sgd,adamw",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per case; more where a sensor needs 2 s to see them.")] = 5,
    cuda: Annotated[bool, typer.Option("--cuda", help="Run the eager cases on the GPU.")] = False,
    tegrastats: Annotated[
        str | None,
        typer.Option(help="Name or path of the Jetson's tegrastats. Default: $TEGRASTATS, else the one on the path."),
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON file for the result; written anew after every case.")] = Path(
        "lamina-memory.json"
    ),
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw it: a .png (needs matplotlib) or an .html file (needs nothing)."),
    ] = None,
) -> None:
    """Measure peak memory, CPU time and energy of training on this machine.

    Every case runs in a fresh process. A case that fails, is killed or crashes stays in the table with what happened; the
    others go on. Without --bundle the programs are made first, which needs `lamina[export]` and may take minutes.
    """
    import sys
    from contextlib import nullcontext
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from benchmarks.device.cases import SIDES, read_bench_bundle
    from benchmarks.device.measure import Settings, measure
    from benchmarks.device.plot import check_plot_path, draw, result_charts
    from benchmarks.device.results import MemoryResult, write_result
    from benchmarks.device.tables import faults, result_table

    optimizers = _chosen("--optimizer", optimizer, ("sgd", "adamw"))
    if plot is not None:
        check_plot_path(plot)
    command = " ".join(["lamina", *sys.argv[1:]])
    console, err = _console(), Console(stderr=True)
    with nullcontext(str(bundle)) if bundle else TemporaryDirectory(prefix="lamina-bench-") as folder:
        if bundle is None:
            from benchmarks.device.prepare import prepare as prepare_cases

            orders = _orders(workload, engine, case, batch, stage, micro_batch)
            with telling("prepare") as tell:
                prepared = prepare_cases(orders, Path(folder), command, tell)
        else:
            if micro_batch is not None:
                raise ConfigError("--micro-batch is decided by `lamina bench prepare`; leave it out with --bundle")
            prepared = read_bench_bundle(bundle)
        wanted = {
            "workload": _chosen("--workload", workload, tuple({c.workload for c in prepared.cases})),
            "side": _chosen("--engine", engine, SIDES),
            "case": _chosen("--case", case, tuple(dict.fromkeys(c.case for c in prepared.cases))),
            "batch": _numbers("--batch", batch) if batch else tuple({c.batch for c in prepared.cases}),
            "block": _blocks(stage) if stage else tuple({c.block for c in prepared.cases}),
        }
        cases = [c for c in prepared.cases if all(getattr(c, name) in values for name, values in wanted.items())]
        if not cases:
            raise ConfigError(f"{bundle} holds no case that was asked for; leave options out to see what it holds")

        def save(result: MemoryResult) -> None:
            write_result(output, result)
            row = result.rows[-1]
            if not err.is_terminal:
                peak = f"{row.peak_rss_bytes / 2**20:.0f} MiB" if row.peak_rss_bytes else ""
                err.print(f"{row.workload}, {row.side}, {row.case}, {row.optimizer}: {row.status} {peak}", highlight=False)

        with telling("measure") as tell:
            settings = Settings(steps, optimizers, cuda, tegrastats)
            result = measure(prepared, Path(folder), cases, settings, command, save, tell)
    for name in dict.fromkeys(row.workload for row in result.rows):
        console.print(result_table(result, name))
    for fault in faults(result.rows):
        console.print(fault, soft_wrap=True, highlight=False, markup=False)
    console.print(f"written to {output}", soft_wrap=True)
    if plot is not None:
        draw(result_charts(result), f"Training on {result.device}", [result.command, result.sensors], plot)
        console.print(f"drawn to {plot}", soft_wrap=True)


@bench.command()
def prepare(
    output: Annotated[Path, typer.Option(help="Folder for the programs; empty, or written by this command.")],
    workload: Workloads = None,
    engine: Engines = None,
    case: Cases = None,
    batch: Batches = None,
    stage: Stages = None,
    micro_batch: MicroBatch = None,
) -> None:
    """Make the programs of `lamina bench memory` for a machine that has no torch.

    Copy the folder to the device and give it there as --bundle. Lowering 12 blocks end to end for ExecuTorch takes minutes;
    lowered programs are kept in ~/.cache/lamina/programs (or $LAMINA_CACHE).
    """
    import sys

    from benchmarks.device.prepare import prepare as prepare_cases

    orders = _orders(workload, engine, case, batch, stage, micro_batch)
    with telling("prepare") as tell:
        bundle = prepare_cases(orders, output, " ".join(["lamina", *sys.argv[1:]]), tell)
    for prepared in bundle.cases:
        if prepared.unavailable:
            typer.echo(f"{prepared.label()}: {prepared.unavailable}")
    ready = sum(prepared.unavailable is None for prepared in bundle.cases)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    typer.echo(f"{output}: {ready} of {len(bundle.cases)} cases are ready, {size:,} bytes in all")


@bench.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Result files of `lamina bench memory`, two or more.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png (needs matplotlib) or an .html file.")] = None,
) -> None:
    """Put the results of several machines side by side, each with its ratio to the first."""
    from benchmarks.device.compare import common_rows, comparison_charts, read_all
    from benchmarks.device.plot import check_plot_path, draw
    from benchmarks.device.tables import comparison_table

    if plot is not None:
        check_plot_path(plot)
    names, found = read_all(results)
    lines = common_rows(names, found)
    console = _console()
    console.print(comparison_table(names, found, lines))
    if plot is not None:
        notes = [f"{name}: {result.device}; {result.sensors}" for name, result in zip(names, found, strict=True)]
        draw(comparison_charts(names, lines), "Training side by side", notes, plot)
        console.print(f"drawn to {plot}", soft_wrap=True)


def _orders(
    workload: str | None, engine: str | None, case: str | None, batch: str | None, stage: str | None, micro_batch: int | None
) -> "list[Order]":
    """Every combination of the options, in the order of the table."""
    from benchmarks.device.cases import CASES, SIDES
    from benchmarks.device.prepare import Order, installed_sides
    from benchmarks.device.workloads import WORKLOADS

    sides = _chosen("--engine", engine, SIDES) if engine else installed_sides()
    cases = [CASES[name] for name in _chosen("--case", case, tuple(CASES))]
    orders = []
    for name in _chosen("--workload", workload or "vit12", tuple(WORKLOADS)):
        known = WORKLOADS[name]
        orders += [
            Order(name, side, kind, size, (micro_batch or min(known.micro_batch, size)) if kind.is_micro else None, block)
            for block in _blocks(stage or "last")
            for size in (_numbers("--batch", batch) if batch else (known.batch,))
            for side in sides
            for kind in cases
            # Without being asked for, a case that an engine cannot have is left out.
            if case or not kind.lacks(side)
        ]
    return orders


def _console() -> "Console":
    """A terminal has its own width; a file or a log gets what the tables need."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def _chosen(option: str, given: str | None, known: tuple[Name, ...]) -> tuple[Name, ...]:
    """The names of a comma-separated list, in the order of `known`; all of them if nothing was given."""
    if given is None:
        return known
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names or [""]:
        if name not in known:
            raise ConfigError(f"{option} {name!r} is not known; known: {', '.join(sorted(known))}")
    return tuple(name for name in known if name in names)


def _numbers(option: str, given: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in given.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ConfigError(f"{option} {given!r}: give positive whole numbers, separated by commas")
    return numbers


def _blocks(given: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part.strip() == "last" else int(part) for part in given.split(","))
    except ValueError as error:
        raise ConfigError(f"--stage {given!r}: give numbers of blocks or `last`, separated by commas") from error
