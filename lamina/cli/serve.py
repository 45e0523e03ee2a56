"""`lamina serve`: run a coordinator."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    state: Annotated[
        Path, typer.Option(help="Folder for the database, the blobs and the token files; created if it does not exist.")
    ],
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. The default is reachable from this machine alone; 0.0.0.0 lets in every machine "
            "of the network, over plain HTTP: put a proxy with TLS in front, or use a network that you trust."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8763,
    wait_seconds_min: Annotated[
        float, typer.Option(min=0.01, help="Shortest time in seconds after which a waiting device asks again.")
    ] = 0.5,
    wait_seconds_max: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=30.0,
            help="Longest time in seconds after which a waiting device asks again; raise it for a large fleet.",
        ),
    ] = 2.0,
    keep_rounds: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Of so many closed rounds of each run the weights are kept, for `lamina run rollback`.",
        ),
    ] = 3,
    trust: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Public key of an exporter, as `lamina key show` prints it there: bundles that it signed may be published. "
            "Repeat it for more than one. Kept in the state folder; keys given now replace those given before. Keys of this "
            "machine, and those of `lamina key trust`, are trusted too.",
        ),
    ] = None,
    allow_unsigned: Annotated[
        bool,
        typer.Option(
            "--allow-unsigned", help="Take bundles that nobody signed. Devices refuse them all the same, unless told too."
        ),
    ] = False,
) -> None:
    """Run a coordinator until it is interrupted.

    Prints its address, which also stands in the file `address` of the state folder, and the paths of two token files:
    devices join with the enrolment token, `lamina publish` and `lamina status` use the admin token. Whatever was accepted
    survives a crash; start again with the same folder to continue. A bundle that no trusted key signed is refused.
    """
    import logging

    from coordinator.http.addresses import device_urls
    from coordinator.serve import serve as run_coordinator
    from coordinator.settings import Settings
    from lamina.bundles.signing import TrustedKeys
    from lamina.errors import ConfigError

    if wait_seconds_min > wait_seconds_max:
        raise ConfigError(f"--wait-seconds-min {wait_seconds_min} is above --wait-seconds-max {wait_seconds_max}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = Settings(
        state=state,
        host=host,
        port=port,
        wait_seconds_min=wait_seconds_min,
        wait_seconds_max=wait_seconds_max,
        allow_unsigned=allow_unsigned,
        keep_rounds=keep_rounds,
    )
    if trust:
        TrustedKeys.given(trust, "given to `lamina serve --trust`").write(settings.trusted)

    def tell(url: str) -> None:
        typer.echo(f"The coordinator listens on {url}")
        first, *others = device_urls(url, host)
        typer.echo(f"A device joins with a copy of the token in {settings.enrolment_token}:")
        typer.echo(f"    lamina join {first} --data DATA.npz --name NAME --engine onnxruntime --state STATE --token-file TOKEN")
        if others:
            typer.echo(f"or, where it does not reach that, with {', '.join(others)}")
        typer.echo(f"Publish and see the status with the token in {settings.admin_token}")

    run_coordinator(settings, tell)
