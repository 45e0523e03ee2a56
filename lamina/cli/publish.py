"""`lamina publish`: give a bundle to a coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.progress import counting


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
    from lamina.bundles.bundle import read_bundle
    from lamina.bundles.keys import users_trust
    from lamina.client import Client, read_token

    token = read_token(token_file)
    with Client(url, token) as client:
        with counting("verify") as show:
            manifest = read_bundle(
                bundle,
                lambda done, total: show("verify", done, total),
                trust=users_trust(allow_unsigned),
                tell=lambda line: typer.echo(line, err=True),
            )
        total_bytes, sent_bytes = sum(manifest.blobs.values()), 0
        with counting("send", is_bytes=True) as show:

            def sent(count: int) -> None:
                nonlocal sent_bytes
                sent_bytes += count
                show("send", sent_bytes, total_bytes)

            published = client.publish(bundle, manifest, sent)
    typer.echo(published.run)
