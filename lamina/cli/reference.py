"""Writes what the program says of itself, so that it cannot rot: `docs/cli.md` and `docs/protocol.schema.json`.

python -m lamina.cli.reference
"""

import json
from collections.abc import Iterator
from inspect import isclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from typer.main import get_command
from typer.testing import CliRunner

from lamina import wire
from lamina.cli.main import app
from lamina.record import Record

DOCS = Path(__file__).parents[2] / "docs"
PAGE, SCHEMA = DOCS / "cli.md", DOCS / "protocol.schema.json"


def verbs(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, click command) of the program, its verbs and its groups' verbs: ((), lamina), (("demo",), ...), ..."""
    command = command or get_command(app)
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from verbs(child, (*path, name))


def render() -> str:
    """The page: one section for each verb and group, holding its `--help`."""
    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    parts = ["# The command line\n\nWritten by `make docs` from the program; `tests/test_docs.py` holds the two equal.\n"]
    for words, _ in verbs():
        text = runner.invoke(app, [*words, "--help"], prog_name="lamina").output.strip()
        parts.append(f"## {' '.join(('lamina', *words))}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def messages() -> list[type[BaseModel]]:
    """Every message of the wire, in the order of its code."""
    return [
        kind for kind in vars(wire).values() if isclass(kind) and issubclass(kind, Record) and kind.__module__ == wire.__name__
    ]


def render_schema() -> str:
    """JSON Schema 2020-12 of every message, for clients in other languages: `$defs/<message>`."""
    _, schema = models_json_schema([(kind, "validation") for kind in messages()], title="The wire of lamina, version 1")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(head | schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
    SCHEMA.write_text(render_schema())
