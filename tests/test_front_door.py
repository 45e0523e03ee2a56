"""`import lamina`: what it gives, what it costs, and that the page that shows it runs as it stands."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
import lamina.errors

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_all_is_sorted_and_there_and_has_every_error() -> None:
    assert lamina.__all__ == sorted(lamina.__all__) and set(lamina.__all__) <= set(dir(lamina))
    for name in lamina.__all__:
        assert getattr(lamina, name).__name__ == name
    errors = {name for name, kind in vars(lamina.errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert errors == {name for name in lamina.__all__ if name.endswith("Error")}
    with pytest.raises(AttributeError, match="it has BundleError"):
        lamina.nothing  # noqa: B018


def test_importing_it_loads_nothing() -> None:
    code = "import sys, lamina\nprint(*sorted(name for name in sys.modules if name.startswith('lamina') or name == 'pydantic'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["lamina"]
    assert (Path(lamina.__file__).parent / "py.typed").is_file()


def test_the_page_runs_as_it_stands_and_the_model_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    result = names["result"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("stage 0, round 0: train loss ")
    assert [(row.stage, row.round) for row in result.rounds] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert result.test_accuracy > 0.6  # of three classes
    assert result.table().row_count == 5 and (tmp_path / "motion.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("source", "engine", "told"),
    [("none.toml", "onnxruntime", "does not exist"), ("none.toml", "onyx", "does not exist|unknown engine 'onyx'")],
)
def test_what_cannot_be_is_a_named_error(source: str, engine: str, told: str) -> None:
    with pytest.raises(lamina.ConfigError, match=told):
        lamina.simulate(source, [], engine=engine)
