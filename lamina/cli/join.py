"""`lamina join`: this machine becomes a device of a coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.cli import device_options as options


def join(
    url: options.Url,
    data: Annotated[
        Path,
        typer.Option(
            help="The device's examples: an .npz file with the arrays train_<modality>, train_label, test_<modality> and "
            "test_label. It never leaves this machine.",
        ),
    ],
    name: options.Name,
    engine: options.Engine,
    state: options.State,
    token_file: options.TokenFile = None,
    run: options.Run = None,
    until_finished: options.UntilFinished = False,
    resident: options.Resident = False,
    disk_mb: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most megabytes of stored features; what does not fit is computed anew in each epoch. Without it, all are "
            "stored.",
        ),
    ] = None,
    stall_minutes: options.StallMinutes = 30.0,
    trust: options.Trust = None,
    allow_unsigned: options.AllowUnsigned = False,
) -> None:
    """Train on this machine's data as a device of a coordinator.

    The command checks in, downloads what it lacks, trains, sends the update and asks again. It may be stopped or killed at
    any moment; the same command goes on where it was. Training has a process of its own: if the runtime fails or memory runs
    out, that is one failed attempt, and the device goes on.
    """
    options.start_client(
        url,
        data,
        name,
        engine,
        state,
        token_file,
        run,
        until_finished,
        resident,
        trust,
        allow_unsigned,
        stall_seconds=60 * stall_minutes,
        disk_bytes=None if disk_mb is None else disk_mb * 10**6,
    )
