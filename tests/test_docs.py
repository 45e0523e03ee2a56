"""The pages say what the program does: commands, help, plan keys, README."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from benchmarks.demo.plan import MODEL, blended, demo_plan
from lamina.cli.reference import PAGE, SCHEMA, render, render_schema, verbs
from lamina.plans import model, plan
from lamina.plans.plan import Plan
from lamina.record import Record

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LEAVES = {" ".join(words): command for words, command in verbs() if not hasattr(command, "commands")}
RECORDS = [
    value
    for module in (model, plan)
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Record) and value is not Record and value.__module__ == module.__name__
]


def test_the_command_line_page_is_what_the_program_says() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("verb", LEAVES)
def test_a_verb_has_help_for_itself_and_each_option_and_stands_in_the_readme(verb: str) -> None:
    assert LEAVES[verb].help
    for option in LEAVES[verb].params:
        assert option.name == "help" or option.help, f"{verb}: {option.name} has no help"
    assert re.search(rf"^lamina {verb}\b", README, re.MULTILINE), f"the README uses no `lamina {verb}`"


def test_every_lamina_command_of_the_pages_parses() -> None:
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md") if page != PAGE)]
    lines = [line for page in pages for line in re.findall(r"^(lamina .*?[^\\])$", page.replace("\\\n", " "), re.MULTILINE)]
    assert len(lines) >= len(LEAVES)
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        verb = " ".join(words[:2]) if " ".join(words[:2]) in LEAVES else words[0]
        assert verb in LEAVES, line
        known = {name for option in LEAVES[verb].params for name in (*option.opts, *option.secondary_opts)}
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in known, f"{line}: {word}"


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
    assert len(RECORDS) == 24
    assert set(sections) == {record.__name__ for record in RECORDS}
    for record in RECORDS:
        rows = re.findall(r"^\| `(\w+)` \|", sections[record.__name__], re.MULTILINE)
        assert rows == list(record.model_fields), record.__name__


def test_the_plan_file_to_copy_is_the_plan_of_the_demo() -> None:
    file = ROOT / "benchmarks" / "plans" / "av_digits.json"
    assert Plan.from_file(file) == demo_plan(blended(MODEL), "layerwise", rounds=18, layers_per_stage=1, devices=4, seed=0)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    assert links
    for page, link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_schema_of_the_wire_is_that_of_the_code() -> None:
    assert SCHEMA.read_text() == render_schema(), "run `make docs`"
