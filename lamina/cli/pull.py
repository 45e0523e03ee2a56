"""`lamina pull`: fetch the newest weights of a run."""

from pathlib import Path
from typing import Annotated

import typer


def pull(
    url: Annotated[str, typer.Argument(help="Address of the coordinator, e.g. http://127.0.0.1:8763.")],
    run: Annotated[str, typer.Argument(help="Name of the run, e.g. run-1.")],
    out: Annotated[Path, typer.Option(help="Folder for the files, one `<segment>.safetensors` for each segment.")],
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the admin token; without it, the environment variable LAMINA_TOKEN is read."),
    ] = None,
) -> None:
    """Fetch the newest weights of every segment of a run, each verified by its sha256.

    `lamina assemble` makes a deployable model of them. A run need not be finished.
    """
    from lamina import api

    status = api.pull(url, run, out, token_file)
    typer.echo(f"{len(status.weights)} segments of {run} ({status.detail}) are in {out}")
