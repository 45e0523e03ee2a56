"""The pages say what the program does: commands, help, plan keys, README."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.demo_plan import MODEL, demo_plan
from lamina import model, plan
from lamina.cli.main import VERBS, app
from lamina.cli.reference import PAGE, render
from lamina.plan import Plan
from lamina.record import Record

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECORDS = [
    value
    for module in (model, plan)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Record) and value is not Record and value.__module__ == module.__name__
]


def test_the_command_line_page_is_what_the_program_says() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_a_verb_has_help_for_itself_and_each_option_and_stands_in_the_readme(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    command = next(command for command in app.registered_commands if command.callback and command.callback.__name__ == verb)
    assert command.callback is not None and command.callback.__doc__
    for name, annotation in command.callback.__annotations__.items():
        if name != "return":
            assert getattr(annotation, "__metadata__", None) and annotation.__metadata__[0].help, f"{verb}: {name} has no help"
    assert re.search(rf"^lamina {verb}\b", README, re.MULTILINE), f"the README uses no `lamina {verb}`"


def test_every_lamina_command_of_the_readme_parses() -> None:
    lines = re.findall(r"^(lamina .*?[^\\])$", README.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) >= len(VERBS)
    for line in lines:
        verb, *arguments = shlex.split(line, comments=True)[1:]
        command = next(c for c in app.registered_commands if c.callback and c.callback.__name__ == verb)
        options = {option for option in arguments if option.startswith("--")}
        shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [verb, "--help"]).output
        assert command is not None
        for option in options:
            assert option.split("=")[0] in shown, f"{line}: {option}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    assert {"demo", "test"} <= used
    assert used <= targets


def test_the_readme_names_the_python_of_the_package() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert requires == ">=3.11,<3.13"
    assert "Python 3.11 or 3.12" in README


def test_every_plan_key_has_a_row() -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert len(RECORDS) == 15
    assert set(sections) == {record.__name__ for record in RECORDS}
    for record in RECORDS:
        rows = re.findall(r"^\| `(\w+)` \|", sections[record.__name__], re.MULTILINE)
        assert rows == list(record.model_fields), record.__name__


def test_the_plan_file_to_copy_is_the_plan_of_the_demo() -> None:
    file = ROOT / "benchmarks" / "plans" / "av_digits.json"
    assert Plan.from_file(file) == demo_plan(MODEL, "layerwise", rounds=18, layers_per_stage=1, devices=4, seed=0)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    assert links
    for page, link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
