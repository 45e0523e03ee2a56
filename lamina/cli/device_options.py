"""What the verbs share that make this machine a client of a coordinator: their options, and the start of the client."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lamina.errors import ConfigError
from lamina.names import ENGINES

Url = Annotated[str, typer.Argument(help="Address of the coordinator, as `lamina serve` prints it: http://192.168.1.10:8763.")]
Name = Annotated[str, typer.Option(help="Name of this device, unique at the coordinator: letters, digits, '.', '_', '-'.")]
Engine = Annotated[str, typer.Option(help=f"Runtime that trains: {', '.join(ENGINES)}. It must be installed here.")]
State = Annotated[
    Path,
    typer.Option(
        help="Folder that makes this device the same one after a restart: identity, downloads and cached features. "
        "One folder for each device.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="File with the enrolment token; without it, LAMINA_TOKEN is read. Only needed the first time."),
]
Run = Annotated[str | None, typer.Option(help="Take part in this run only; otherwise in any open run.")]
UntilFinished = Annotated[
    bool,
    typer.Option(
        "--until-finished",
        help="Leave when no run is open any more, after at least one assignment was done; otherwise wait for the next.",
    ),
]
Resident = Annotated[
    bool,
    typer.Option(
        "--resident",
        help="Keep the talking and the training process between rounds: each round starts a second sooner, and the device "
        "holds about 55 MiB more.",
    ),
]
StallMinutes = Annotated[
    float,
    typer.Option(
        min=0.01,
        max=10_000,
        help="So long at most the training process may do no batch and no feature rows: then it is ended, which is one failed "
        "attempt. After the first batch, 50 times the longest one so far is enough, but never less than ten minutes.",
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Public key of the exporter, as `lamina key show` prints it there: programs that another key signed are "
        "refused. Repeat it for more than one. Kept in the state folder; keys given now replace those kept. Without it, "
        "the first key that the coordinator shows is kept, and its fingerprint told.",
    ),
]
AllowUnsigned = Annotated[
    bool,
    typer.Option("--allow-unsigned", help="Run programs that nobody signed. Whoever alters them on the way is then unseen."),
]


def start_client(
    url: str,
    data: Path,
    name: str,
    engine: str,
    state: Path,
    token_file: Path | None,
    run: str | None,
    until_finished: bool,
    resident: bool,
    trust: list[str] | None,
    allow_unsigned: bool,
    **more: str | int | float | None,
) -> NoReturn:
    """This process becomes the client; `more` are further options of `edge_client.talk.device.Options`."""
    from edge_client.process.start import start
    from lamina.bundles.signing import key_text, parse_key

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
            "trust": [key_text(parse_key(key)) for key in trust or ()],
            "allow_unsigned": allow_unsigned,
            **more,
        }
    )
