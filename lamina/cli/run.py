"""`lamina run`: what an operator can do to a run, and what was done."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lamina.wire import HistoryEntry, RunCommand

run = typer.Typer(
    name="run",
    no_args_is_help=True,
    help="Pause, resume and cancel a run, close its round, take rounds back, and see what was done. These commands need the "
    "admin token. For example: lamina run rollback http://127.0.0.1:8763 run-1 --to 0.4 --token-file admin.token",
)

Run = Annotated[str, typer.Argument(help="Name of the run, e.g. run-1.")]
Url = Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the admin token; without it, the environment variable LAMINA_TOKEN is read."),
]
Reason = Annotated[str, typer.Option(help="Why, in at most 200 characters; it stands in the history, and devices are told.")]


@run.command()
def pause(url: Url, run: Run, reason: Reason = "", token_file: TokenFile = None) -> None:
    """Give out no new work. Devices finish and send what they are at; leases and deadlines stand still.

    Devices then work for other runs, or wait.
    """
    _say(url, token_file, run, _command("pause", reason=reason))


@run.command()
def resume(url: Url, run: Run, reason: Reason = "", token_file: TokenFile = None) -> None:
    """Let a paused run go on, or one that has failed: its open round begins anew, with the updates that it has."""
    _say(url, token_file, run, _command("resume", reason=reason))


@run.command()
def cancel(url: Url, run: Run, reason: Reason = "", token_file: TokenFile = None) -> None:
    """End a run for good and free its devices. Its newest weights stay, `lamina pull` fetches them."""
    _say(url, token_file, run, _command("cancel", reason=reason))


@run.command()
def close_round(
    url: Url,
    run: Run,
    at: Annotated[
        str | None,
        typer.Option(metavar="STAGE.ROUND", help="The round that is to close; without it, the one where the run stands now."),
    ] = None,
    reason: Reason = "",
    token_file: TokenFile = None,
) -> None:
    """Close the open round with the updates that are there, at least one.

    Of a round that is calibrated or evaluated, wait no longer for that.
    """
    from lamina.client import Client, read_token

    if at is None:
        with Client(url, read_token(token_file)) as client:
            status = client.run(run)
        stage, number = status.stage, status.round
    else:
        stage, number = position_of(at)
    _say(url, token_file, run, _command("close_round", stage, number, reason))


@run.command()
def rollback(
    url: Url,
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            metavar="STAGE.ROUND",
            help="The closed round to go back to, e.g. 0.4 (stages and rounds count from 0), or `start`: the initial weights.",
        ),
    ],
    reason: Reason = "",
    token_file: TokenFile = None,
) -> None:
    """Go back to the weights with which a round closed; all rounds after it are undone and trained again.

    The weights of the last three closed rounds are kept (`lamina serve --keep-rounds`), also over the end of a stage and of the
    run. A run that has failed goes on; a paused one stays paused. What devices still send for undone rounds is refused.
    """
    stage, number = (None, None) if to == "start" else position_of(to)
    _say(url, token_file, run, _command("rollback", stage, number, reason))


@run.command()
def history(
    url: Url,
    run: Annotated[str | None, typer.Argument(help="Name of a run; without it, all runs and the devices.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the coordinator's answer as JSON.")] = False,
    token_file: TokenFile = None,
) -> None:
    """Show who did what, when, and from which state to which; also what ended by itself. The newest 1,000 rows."""
    from lamina.client import Client, read_token

    with Client(url, read_token(token_file)) as client:
        entries = client.history(run)
    if json:
        typer.echo(entries.to_json(), nl=False)
        return
    for entry in entries.entries:
        typer.echo(line_of(entry))
    if not entries.entries:
        typer.echo("nothing was done yet")


def line_of(entry: "HistoryEntry") -> str:
    """One row of the history as a user sees it; the time is the local one."""
    from datetime import datetime

    when = datetime.fromtimestamp(min(entry.unix_seconds, 253_402_300_799)).astimezone().isoformat(" ", "seconds")
    told = f" ({entry.detail})" if entry.detail else ""
    return f"{when}  {entry.who}: {entry.what} {entry.run or entry.device}: {entry.before} -> {entry.after}{told}"


def position_of(text: str) -> tuple[int, int]:
    """Stage and round of `STAGE.ROUND`. Raises ConfigError."""
    from lamina.errors import ConfigError

    stage, _, number = text.partition(".")
    if not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in (stage, number)):
        raise ConfigError(
            f"{text!r} is no round: say STAGE.ROUND, such as 0.4 for round 4 of stage 0; `lamina status` shows them"
        )
    return int(stage), int(number)


def _command(name: str, stage: int | None = None, number: int | None = None, reason: str = "") -> "RunCommand":
    from pydantic import ValidationError

    from lamina.errors import ConfigError
    from lamina.record import explain
    from lamina.wire import RunCommand

    try:
        return RunCommand.model_validate({"command": name, "stage": stage, "round": number, "reason": reason})
    except ValidationError as error:
        raise ConfigError(f"this is no command: {explain(error)}") from error


def _say(url: str, token_file: Path | None, run: str, command: "RunCommand") -> None:
    from lamina.client import Client, read_token

    with Client(url, read_token(token_file)) as client:
        done = client.command(run, command)
    if done.before == done.after and command.command != "close_round" and not done.detail.partition(";")[0].endswith("undone"):
        typer.echo(f"{run} is {done.after} already; nothing was done")
    else:
        typer.echo(f"{run}: {done.before} -> {done.after}" + (f" ({done.detail})" if done.detail else ""))
