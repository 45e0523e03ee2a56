"""`lamina status`: what a coordinator's runs have done and what they wait for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from lamina.wire import RoundStatus, RunStatus


def status(
    url: Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")],
    run: Annotated[str | None, typer.Argument(help="Name of a run, e.g. run-1; without it, all runs are shown.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the admin token or a device's token; without it, the environment variable LAMINA_TOKEN is read."
        ),
    ] = None,
) -> None:
    """Show the rounds of a run: updates, accuracy, bytes moved, and what it waits for."""
    from rich.console import Console

    from lamina.client import Client, read_token

    console = Console()
    with Client(url, read_token(token_file)) as client:
        names = (run,) if run else client.runs().runs
        for name in names:
            console.print(table_of(client.run(name)))
    if not names:
        console.print("no run was published yet; start one with `lamina publish`")


def table_of(run: "RunStatus") -> "Table":
    """A row for each round; what the run waits for stands below."""
    from rich.table import Table

    notes = (*run.rounds[-1].notes, *failures_of(run.rounds[-1])) if run.rounds else ()
    table = Table(title=f"{run.run}: {run.name}, {run.state}", caption="\n".join((run.detail, *notes)), caption_justify="left")
    for heading in ("stage", "round", "state", "updates", "train loss", "accuracy", "MB down", "MB up", "peak MB"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    encodings = [encodings_of(row) for row in run.rounds]
    if any(encodings):
        table.add_column("not fp32", justify="left")
    for row, encoding in zip(run.rounds, encodings, strict=True):
        table.add_row(*_cells(row), *((encoding,) if any(encodings) else ()))
    return table


def failures_of(row: "RoundStatus") -> list[str]:
    """Devices whose training process died in this round, and came through in the end."""
    return [
        f"{update.device}: {update.report.failed_attempts} failed attempts, {update.report.failure}"
        for update in row.updates
        if update.report.failed_attempts
    ]


def encodings_of(row: "RoundStatus") -> str:
    """Where a round's values travelled rounded, e.g. `down 3 of 4 int8, up 4 of 4 fp16`; empty if nowhere."""
    parts = []
    for direction, used in (
        ("down", [update.download_encoding for update in row.updates]),
        ("up", [update.upload_encoding for update in row.updates]),
    ):
        smaller = sorted(set(used) - {"fp32"})
        parts += [f"{direction} {used.count(encoding)} of {len(used)} {encoding}" for encoding in smaller]
    parts += [f"evaluated in {encoding}" for encoding in row.evaluated_encodings]
    return ", ".join(parts)


def _cells(row: "RoundStatus") -> tuple[str, ...]:
    reports = [update.report for update in row.updates]
    examples = sum(report.num_examples for report in reports)
    loss = sum(report.loss * report.num_examples for report in reports) / examples if examples else None
    return (
        str(row.stage),
        str(row.round),
        row.state,
        str(len(reports)),
        "-" if loss is None else f"{loss:.4f}",
        "-" if row.test_accuracy is None else f"{row.test_accuracy:.4f}",
        f"{sum(report.bytes_down for report in reports) / 1e6:.3f}",
        f"{sum(report.bytes_up for report in reports) / 1e6:.3f}",
        f"{max((report.peak_bytes for report in reports), default=0) / 1e6:.1f}",
    )
