"""`lamina publish`: give a bundle to a coordinator."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.progress import Count, counting


def publish(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, as `lamina export` wrote it.")],
    url: Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")],
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the admin token; without it, the environment variable LAMINA_TOKEN is read."),
    ] = None,
    allow_unsigned: Annotated[
        bool,
        typer.Option("--allow-unsigned", help="Publish a bundle that nobody signed; the coordinator must allow it too."),
    ] = False,
) -> None:
    """Verify a bundle, send what the coordinator lacks of it, and start a run.

    Prints the name of the new run. Publishing the same bundle again sends no blob twice and starts another run. The bundle
    must be signed by a key of this machine, or by one that was trusted with `lamina key trust`.
    """
    from lamina import api

    shown: dict[str, Count] = {}
    with ExitStack() as bar:

        def show(part: str, done: int, total: int) -> None:
            if part not in shown:
                bar.close()  # a terminal shows one bar at a time
                shown[part] = bar.enter_context(counting(part, is_bytes=part == "send"))
            shown[part](part, done, total)

        run = api.publish(bundle, url, token_file, allow_unsigned, show, lambda line: typer.echo(line, err=True))
    typer.echo(run)
