"""`lamina inspect`: what is in a bundle, after every hash and the signature were checked."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle, as `lamina export` wrote it.")],
    json: Annotated[Path | None, typer.Option(help="Write the same figures to this file.")] = None,
    allow_unsigned: Annotated[bool, typer.Option("--allow-unsigned", help="Take a bundle that nobody signed.")] = False,
) -> None:
    """Verify a bundle, and show its stages: who trains what, and what it costs a device.

    The picture has one row for each segment and one letter for each stage: A active, f frozen, a dot not there yet.
    """
    from rich.console import Console

    from lamina.bundles.bundle import bundle_digest, read_bundle
    from lamina.bundles.keys import users_trust
    from lamina.cli.overview_tables import show_bundle
    from lamina.printable import printable_markup

    console = Console()
    manifest = read_bundle(bundle, trust=users_trust(allow_unsigned), tell=typer.echo)
    digest = bundle_digest(bundle)
    console.print(f"{printable_markup(str(bundle), 1000)}: {len(manifest.blobs)} blobs verified, manifest {digest[:12]}")
    found = show_bundle(manifest, digest, console)
    if json is not None:
        json.write_bytes(found.to_json())
