"""`lamina engine`: the runtimes that train on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.errors import ConfigError
from lamina.names import ENGINES, EngineName

engine = typer.Typer(
    name="engine",
    no_args_is_help=True,
    help="Add the runtimes that train on this machine, and see which ones work. None of them needs torch.",
)


@engine.command()
def add(
    name: Annotated[str, typer.Argument(help="executorch or onnxruntime.")],
    wheel: Annotated[
        Path | None,
        typer.Option(help="Wheel file of executorch, for a machine without network; otherwise pip fetches it."),
    ] = None,
) -> None:
    """Add an engine to this machine.

    executorch: keeps the native libraries of its wheel in $LAMINA_ENGINES or ~/.cache/lamina/engines, and builds a small
    shim for them, which needs a C++ compiler. onnxruntime: installs the training package into this Python with pip. Both
    come without the packages that they declare and a device does not use. Repeat the command after a failure.
    """
    from edge_client.engines import install
    from edge_client.engines.executorch_runtime import packaged_runtime

    if name == "executorch":
        runtime, size = install.add_executorch(wheel, _tell)
        typer.echo(f"executorch {runtime.version} is ready: {_megabytes(size)} in {runtime.folder.parent}")
        packaged = packaged_runtime()
        if packaged is not None:
            typer.echo(f"The package executorch {packaged.version} of this Python is used before it: {packaged.folder}")
    elif name == "onnxruntime":
        if wheel is not None:
            raise ConfigError("--wheel is for executorch; install a wheel of onnxruntime with pip install --no-deps FILE")
        install.add_onnxruntime()
        _show(("onnxruntime",))
    else:
        raise ConfigError(
            f"engine {name!r} cannot be added; known: executorch, onnxruntime (torch: pip install 'lamina[torch]')"
        )


@engine.command(name="list")
def list_() -> None:
    """Show the engines of this machine: version, size, folder, and whether each one loads."""
    _show(ENGINES)


def _show(names: tuple[EngineName, ...]) -> None:
    from edge_client.engines.install import find_engines

    for found in find_engines(names, _tell):
        state = "loads" if found.fault is None else f"does not load: {found.fault}"
        where = f"{found.version}, {_megabytes(found.bytes)} in {found.folder}, " if found.folder else ""
        typer.echo(f"{found.name:<12} {where}{state}")


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
