"""Writes `docs/cli.md` from the program itself, so that the page cannot rot: `python -m lamina.cli.reference`."""

from pathlib import Path

from typer.testing import CliRunner

from lamina.cli.main import VERBS, app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def render() -> str:
    """The page: one section for each verb, holding its `--help`."""
    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    parts = ["# The command line\n\nWritten by `make docs` from the program; `tests/test_docs.py` holds the two equal.\n"]
    for name in ("", *(verb.__name__ for verb in VERBS)):
        text = runner.invoke(app, [*([name] if name else []), "--help"], prog_name="lamina").output.strip()
        parts.append(f"## lamina {name}".rstrip() + f"\n\n```\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
