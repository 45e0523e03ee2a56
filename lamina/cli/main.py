"""The `lamina` command: one file per verb, each importing its room only when it is called.

So `lamina join` on a small machine loads neither torch nor a web framework, and a room that is not installed is answered
with the extra that installs it.
"""

import sys

import typer

from lamina import __version__
from lamina.cli.assemble import assemble
from lamina.cli.bench import bench
from lamina.cli.calibrate import calibrate
from lamina.cli.cost import cost
from lamina.cli.data import data
from lamina.cli.demo import demo
from lamina.cli.device import device
from lamina.cli.doctor import doctor
from lamina.cli.engine import engine
from lamina.cli.export import export
from lamina.cli.fit import fit
from lamina.cli.inspect import inspect
from lamina.cli.join import join
from lamina.cli.key import key
from lamina.cli.publish import publish
from lamina.cli.pull import pull
from lamina.cli.run import run
from lamina.cli.serve import serve
from lamina.cli.status import status
from lamina.errors import LaminaError, shown

app = typer.Typer(
    name="lamina",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Train models on small machines one layer at a time, federated over many of them. "
    "The way of a model: export, serve, publish, join (on every device), status, pull, assemble; `demo` shows it all.",
)
VERBS = (demo, doctor, cost, export, inspect, fit, serve, publish, join, calibrate, status, pull, assemble)
for verb in VERBS:
    app.command()(verb)
app.add_typer(run)
app.add_typer(device)
app.add_typer(bench)
app.add_typer(engine)
app.add_typer(key)
app.add_typer(data)

_EXTRA_OF_MODULE = {
    "torch": "export",
    "onnx": "export",
    "onnxscript": "export",
    "fastapi": "coordinator",
    "uvicorn": "coordinator",
    "sqlalchemy": "coordinator",
    "executorch": "export-executorch",
    "torchao": "export-executorch",
    "onnxruntime": "onnxruntime",
    "matplotlib": "bench",
    "yaml": "export",
    "cryptography": "export",
}


def main() -> None:
    """Runs the command line; an error that a user can act on ends with one sentence and status 1."""
    if sys.argv[1:] == ["--version"]:
        print(__version__)  # noqa: T201
        return
    try:
        app()
    except LaminaError as error:
        typer.echo(shown(error), err=True, nl=False)
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_MODULE.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        typer.echo(f"error [config]: this command needs {error.name}; install it: pip install 'lamina[{extra}]'", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
