"""`lamina join`: this machine becomes a device of a coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.errors import ConfigError
from lamina.manifest import ENGINES


def join(
    url: Annotated[str, typer.Argument(help="Address of the coordinator, such as https://host:8000.")],
    data: Annotated[
        Path,
        typer.Option(
            help="The device's examples: an .npz file with the arrays train_<modality>, train_label, test_<modality> and "
            "test_label. It never leaves this machine.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of this device, unique at the coordinator: letters, digits, '.', '_', '-'.")],
    engine: Annotated[str, typer.Option(help=f"Runtime that trains: {', '.join(ENGINES)}. It must be installed here.")],
    state: Annotated[
        Path,
        typer.Option(
            help="Folder that makes this device the same one after a restart: identity, downloads and cached features. "
            "One folder for each device.",
        ),
    ],
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the enrolment token; without it, LAMINA_TOKEN is read. Only needed the first time."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Take part in this run only; otherwise in any open run.")] = None,
    until_finished: Annotated[
        bool,
        typer.Option(
            "--until-finished",
            help="Leave when no run is open any more, after at least one assignment was done; otherwise wait for the next.",
        ),
    ] = False,
) -> None:
    """Train on this machine's data as a device of a coordinator.

    The command checks in, downloads what it lacks, trains, sends the update and asks again. It may be stopped or killed at
    any moment; the same command goes on where it was.
    """
    from edge_client.device import join as join_coordinator
    from edge_client.device import stopped_by_signals
    from edge_client.identity import read_enrolment_token

    chosen = next((known for known in ENGINES if known == engine), None)
    if chosen is None:
        raise ConfigError(f"there is no engine {engine!r}; known: {', '.join(ENGINES)}")
    with stopped_by_signals():
        join_coordinator(
            url,
            data,
            name,
            chosen,
            state,
            lambda: read_enrolment_token(token_file),
            run=run,
            until_finished=until_finished,
        )
