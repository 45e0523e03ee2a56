"""`lamina status`: what a coordinator's runs have done, what they wait for, and who is missing."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lamina.client import RunView
    from lamina.wire import RoundStatus, RunStatus

_MOST_LINES = 8
_NEWEST_ROUNDS = 12
"""A screen that is redrawn has room for so many."""


def status(
    url: Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")],
    run: Annotated[str | None, typer.Argument(help="Name of a run, e.g. run-1; without it, all runs are shown.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the admin token or a device's token; without it, the environment variable LAMINA_TOKEN is read."
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Look again every two seconds until the runs have ended. Without a terminal: a line for each change.",
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the records as one JSON document; with --watch, one in a line for each change."),
    ] = False,
) -> None:
    """Show the rounds of a run: updates, accuracy, bytes moved, what it waits for, and which devices are missing.

    For each device: when it last asked for work, what it did last, and the last refusal that it got. Example:
    `lamina status http://127.0.0.1:8763 run-1 --token-file coordinator-state/admin.token --watch`
    """
    from rich.console import Console

    from lamina.cli.watching import lines_of, watch_lines, watch_screen
    from lamina.client import Client, read_token

    console = Console(highlight=False)
    with Client(url, read_token(token_file)) as client:

        def look() -> "Sequence[RunView]":
            return [client.view(name) for name in ((run,) if run else client.runs().runs)]

        if not watch:
            if json:
                typer.echo(document(look(), indent=1))
            else:
                console.print(screen_of(look()))
            return
        try:
            if console.is_terminal and not json:
                watch_screen(look, lambda views: screen_of(views, _NEWEST_ROUNDS), console)
            else:
                watch_lines(look, document if json else lines_of)
        except KeyboardInterrupt:
            return  # the way to end it


def screen_of(views: "Sequence[RunView]", most_rounds: int | None = None) -> "RenderableType":
    """The rounds of each run (the newest `most_rounds`), what it waits for, and its devices, as far as they are known."""
    from rich.console import Group

    from lamina.cli.device_table import devices_of, missing_of, shown

    parts: list[RenderableType] = []
    for view in views:
        parts.append(table_of(view.status, most_rounds))
        if view.devices is not None and (missing := missing_of(view.devices)):
            parts.append(shown(f"missing: {missing}"))
        if view.devices is not None and view.devices.devices:
            parts.append(devices_of(view.devices))
    return Group(*parts) if parts else shown("no run was published yet; start one with `lamina publish`")


def document(views: "Sequence[RunView]", indent: int | None = None) -> str:
    """`{"runs": [{"status": ..., "devices": ...}]}` with every field, also those that hold their default."""
    import json

    return json.dumps({"runs": [view.model_dump() for view in views]}, indent=indent)


def table_of(run: "RunStatus", most_rounds: int | None = None) -> "RenderableType":
    """A row for each round; what the run waits for stands below, with the notes of the newest round."""
    from rich.console import Group
    from rich.table import Table

    from lamina.cli.device_table import CLOSE, shown

    table = Table(title=shown(f"{run.run}: {run.name}, {run.state}"), padding=CLOSE, title_justify="left")
    headings = ("stage", "round", "state", "updates", "train\nloss", "accuracy", "MB\ndown", "MB\nup", "peak\nMB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "state" else "right", overflow="fold")
    for row in run.rounds[-most_rounds:] if most_rounds else run.rounds:
        table.add_row(*_cells(row))
    notes = (*run.rounds[-1].notes, *failures_of(run.rounds[-1])) if run.rounds else ()
    return Group(table, *(shown(note) for note in (run.detail, *notes, *not_fp32(run.rounds)) if note))


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


def not_fp32(rounds: "Iterable[RoundStatus]") -> list[str]:
    """A line for each way in which values travelled rounded, with the first and the last round in a row that had it."""
    runs: list[tuple[str, list[RoundStatus]]] = []
    for row in rounds:
        told = encodings_of(row)
        if told and runs and runs[-1][0] == told:
            runs[-1][1].append(row)
        elif told:
            runs.append((told, [row]))
    return [f"not fp32: {told} ({_span(rows)})" for told, rows in runs[-_MOST_LINES:]]


def figure(value: float | None, digits: int) -> str:
    """A number in at most 7 characters."""
    if value is None:
        return "-"
    for decimals in range(digits, -1, -1):
        if len(text := f"{value:.{decimals}f}") <= digits + 3:
            return text
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _span(rows: "Sequence[RoundStatus]") -> str:
    first, last = (f"round {row.round} of stage {row.stage}" for row in (rows[0], rows[-1]))
    return first if len(rows) == 1 else f"{first} to {last}"


def _cells(row: "RoundStatus") -> tuple[str, ...]:
    reports = [update.report for update in row.updates]
    examples = sum(report.num_examples for report in reports)
    loss = sum(report.loss * report.num_examples for report in reports) / examples if examples else None
    return (
        str(row.stage),
        str(row.round),
        row.state,
        str(len(reports)),
        figure(loss, 4),
        figure(row.test_accuracy, 4),
        figure(sum(report.bytes_down for report in reports) / 1e6, 3),
        figure(sum(report.bytes_up for report in reports) / 1e6, 3),
        figure(max((report.peak_bytes for report in reports), default=0) / 1e6, 1),
    )
