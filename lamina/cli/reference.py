"""Writes `docs/cli.md` from the program itself, so that the page cannot rot: `python -m lamina.cli.reference`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from lamina.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


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


if __name__ == "__main__":
    PAGE.write_text(render())
