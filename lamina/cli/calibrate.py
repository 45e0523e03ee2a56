"""`lamina calibrate`: this machine trains all layers together on the server's own data, after each round of a run."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.cli import device_options as options


def calibrate(
    url: options.Url,
    data: Annotated[
        Path,
        typer.Option(
            help="The server's own examples: an .npz file with arrays as devices have them, train_<modality> and, if the "
            "objective needs labels, train_label. It never leaves this machine.",
        ),
    ],
    name: options.Name,
    engine: options.Engine,
    state: options.State,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the admin token; without it, LAMINA_TOKEN is read. Only needed the first time."),
    ] = None,
    run: options.Run = None,
    until_finished: options.UntilFinished = False,
    resident: options.Resident = False,
    stall_minutes: options.StallMinutes = 30.0,
    trust: options.Trust = None,
    allow_unsigned: options.AllowUnsigned = False,
) -> None:
    """Calibrate a run whose plan has `calibration`: after each round, train all layers on data of the server's own.

    The coordinator aggregates the devices' updates and hands the weights to this command, which trains everything that is
    attached so far and sends the difference back; the next round starts from there. Without a running calibrator, such a run
    waits. All layers are trained at once, so this needs the memory of end-to-end training: run it beside the coordinator,
    or on a workstation, and not on a device. It may be stopped or killed at any moment; the same command goes on.
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
        role="calibrator",
    )
