"""Looking at runs again and again: on a screen that is redrawn, or a line for each change."""

import time
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live

from lamina.cli.device_table import missing_of, shown
from lamina.client import RunView
from lamina.errors import UnreachableError
from lamina.printable import printable
from lamina.wire import DeviceState

WATCH_SECONDS = 2.0
_OPEN_STATES = ("running", "paused")
_MOST_CHARACTERS = 1000
Look = Callable[[], Sequence[RunView]]
Sleep = Callable[[float], None]


def watch_screen(
    look: Look, draw: Callable[[Sequence[RunView]], RenderableType], console: Console, sleep: Sleep = time.sleep
) -> None:
    """Redraws until no run is open. A coordinator that does not answer for a while is asked again."""
    screen: RenderableType = shown("asking the coordinator")
    with Live(screen, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for views in _until_ended(look, sleep):
            if isinstance(views, UnreachableError):
                live.update(Group(screen, shown(_no_answer(views))), refresh=True)
            else:
                screen = draw(views)
                live.update(screen, refresh=True)


def watch_lines(look: Look, tell: Callable[[Sequence[RunView]], str], sleep: Sleep = time.sleep) -> None:
    """Prints what `tell` says at each change until no run is open: for logs and other programs."""
    last: object = None
    for views in _until_ended(look, sleep):
        if isinstance(views, UnreachableError):
            now: object = views.code
            if now != last:
                typer.echo(_no_answer(views), err=True)
        else:
            now = [line_of(view) for view in views]
            if now != last:
                typer.echo(tell(views))
        last = now


def lines_of(views: Sequence[RunView]) -> str:
    now = time.strftime("%H:%M:%S")
    return "\n".join(f"{now} {line}" for line in [line_of(view) for view in views] or ["no run was published yet"])


def line_of(view: RunView) -> str:
    """A run in one line without anything that moves by itself: it changes when something happens."""
    run, devices = view.status, view.devices
    row = run.rounds[-1] if run.rounds else None
    parts = [f"stage {run.stage} round {run.round}"]
    if row is not None and (row.stage, row.round) == (run.stage, run.round):
        parts[0] += f" {row.state}, {len(row.updates)} updates"
        parts += row.notes
    elif run.state == "running":
        parts[0] += " waits for its cohort"
    evaluated = [each for each in run.rounds if each.test_accuracy is not None]
    parts += [f"accuracy {evaluated[-1].test_accuracy:.4f}"] if evaluated else []
    if devices is not None:
        parts.append(f"{devices.here} devices are here")
        if missing := missing_of(devices):
            parts.append(f"missing: {missing}")
        parts += [f"{device.device} is refused: {device.refusal}" for device in devices.devices if _was_refused_last(device)]
    if run.state not in ("running", "finished"):
        parts.append(run.detail)
    return printable(f"{run.run} {run.state}: {'; '.join(parts)}", _MOST_CHARACTERS)


def _was_refused_last(device: DeviceState) -> bool:
    """Whether it has done nothing since its last refusal."""
    return device.refused_seconds is not None and (device.did_seconds is None or device.refused_seconds < device.did_seconds)


def _until_ended(look: Look, sleep: Sleep) -> Iterator[Sequence[RunView] | UnreachableError]:
    """What is seen at each look. Before the first run is published there is something to wait for, too."""
    while True:
        try:
            views = look()
            yield views
            if views and not any(view.status.state in _OPEN_STATES for view in views):
                return
        except UnreachableError as error:
            yield error
        sleep(WATCH_SECONDS)


def _no_answer(error: UnreachableError) -> str:
    return f"no answer, asking again: {printable(error.message)}"
