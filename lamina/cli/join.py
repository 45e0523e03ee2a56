"""`lamina join`: this machine becomes a device of a coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.errors import ConfigError
from lamina.names import ENGINES


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
    resident: Annotated[
        bool,
        typer.Option(
            "--resident",
            help="Keep the talking and the training process between rounds: each round starts a second sooner, and the device "
            "holds about 55 MiB more.",
        ),
    ] = False,
    disk_mb: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most megabytes of stored features; what does not fit is computed anew in each epoch. Without it, all are "
            "stored.",
        ),
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Public key of the exporter, as `lamina key show` prints it there: programs that another key signed are "
            "refused. Repeat it for more than one. Kept in the state folder; keys given now replace those kept. Without it, "
            "the first key that the coordinator shows is kept, and its fingerprint told.",
        ),
    ] = None,
    allow_unsigned: Annotated[
        bool,
        typer.Option(
            "--allow-unsigned", help="Run programs that nobody signed. Whoever alters them on the way is then unseen."
        ),
    ] = False,
) -> None:
    """Train on this machine's data as a device of a coordinator.

    The command checks in, downloads what it lacks, trains, sends the update and asks again. It may be stopped or killed at
    any moment; the same command goes on where it was. Training has a process of its own: if the runtime fails or memory runs
    out, that is one failed attempt, and the device goes on.
    """
    from edge_client.start import start
    from lamina.signing import key_text, parse_key

    if engine not in ENGINES:
        raise ConfigError(f"there is no engine {engine!r}; known: {', '.join(ENGINES)}")
    start(
        {
            "url": url,
            "data": str(data),
            "name": name,
            "engine": engine,
            "state": str(state),
            "token_file": str(token_file) if token_file else None,
            "run": run,
            "until_finished": until_finished,
            "is_resident": resident,
            "disk_bytes": None if disk_mb is None else disk_mb * 10**6,
            "trust": [key_text(parse_key(key)) for key in trust or ()],
            "allow_unsigned": allow_unsigned,
        }
    )
