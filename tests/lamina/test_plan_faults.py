"""A plan file with faults: all of them at once, a line each, before anything is imported that takes seconds."""

import subprocess
import sys

import pytest

from lamina.errors import ConfigError
from lamina.plans.recipe import read_recipe

FAULTY = """
name = "x"
roundz = 3
[encoders.image]
factory = "my_vit:make"
[training]
batchsize = 3
"""


def test_every_fault_has_its_line(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(FAULTY)
    with pytest.raises(ConfigError) as error:
        read_recipe(path)
    first, *lines = error.value.message.splitlines()
    assert first == f"{path} is not a valid Recipe:"
    assert lines == [
        "  training.batchsize: unknown key; did you mean 'batch_size'?",
        "  roundz: unknown key; did you mean 'rounds'?",
    ]


def test_one_fault_stands_behind_the_colon(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(FAULTY.replace("roundz", "rounds"))
    with pytest.raises(ConfigError, match=r"Recipe: training\.batchsize: unknown key"):
        read_recipe(path)


@pytest.mark.parametrize(
    "command",
    [["export", "{plan}", "--out", "bundle"], ["cost", "{plan}"], ["fit", "{plan}", "--engine", "torch", "--memory-mb", "9"]],
    ids=lambda command: command[0],
)
def test_a_typo_is_told_before_torch_is_imported(command, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(FAULTY)
    program = (
        "import sys\n"
        "from lamina.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    arguments = [text.format(plan=path) for text in command]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert "did you mean 'rounds'" in done.stderr
    assert done.stdout.split() == ["1", "False"]
