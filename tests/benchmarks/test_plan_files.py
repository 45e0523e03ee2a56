"""The plan files are what docs/methods.md says they are: a user can copy each of them."""

import re
from pathlib import Path

import pytest

from benchmarks.methods.data_sets import DATA_SETS
from benchmarks.methods.plans import ALL
from lamina.plans.plan import Plan
from lamina.plans.recipe import read_recipe

ROOT = Path(__file__).parents[2]
OWN_PAGE = {"minilm"}
"""Those that need downloaded weights, or have a page of their own."""
FILES = sorted(path for path in (ROOT / "benchmarks" / "plans").glob("*.toml") if path.stem not in OWN_PAGE)
PAGE = (ROOT / "docs" / "methods.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_plan_file_becomes_a_plan(path: Path) -> None:
    from export.plans.resolve import resolve

    recipe = read_recipe(path)
    assert not isinstance(recipe, Plan)
    assert recipe.name == path.stem
    assert path.read_text().startswith("# ")
    plan = resolve(str(path)).plan
    assert plan.strategy == recipe.strategy


def test_the_page_lists_every_method() -> None:
    listed = set(re.findall(r"`benchmarks/plans/(\w+)\.toml`", PAGE))
    assert listed - OWN_PAGE == {path.stem for path in FILES}


@pytest.mark.parametrize(("name", "data", "rounds"), [("lamina", "av_digits_medium", 18), ("lamina_simclr", "fashion", 54)])
def test_the_recipes_are_what_the_comparison_runs(name: str, data: str, rounds: int) -> None:
    from export.plans.resolve import resolve

    of_the_file = resolve(str(ROOT / "benchmarks" / "plans" / f"{name}.toml")).plan
    compared = ALL[name](DATA_SETS[data].model, rounds, 4, of_the_file.seed)
    renamed = compared.model.model_copy(update={"name": of_the_file.model.name})
    assert of_the_file == compared.model_copy(update={"name": of_the_file.name, "model": renamed})
