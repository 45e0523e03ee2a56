"""The commands of docs/data.md run as they stand there, on data sets of the form that the page describes."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_client.rows.local_data import LocalData
from lamina.cli.main import app
from lamina.data.pack import pack
from tests.lamina.test_data_pack import write_plan
from tests.lamina.trees import (
    MOTION,
    PICTURE,
    SOUND,
    TEXT,
    advance_tree,
    coco_tree,
    make_model,
    opened,
    photo_folder,
    write_image,
    write_sound,
)

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^#+ (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def commands(section):
    return re.findall(r"^lamina (.*?[^\\])$", SECTIONS[section].replace("\\\n", " "), re.MULTILINE)


def blocks(section, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def photos():
    photo_folder(Path("photos"))
    Path("names.txt").write_text("cat\ndog\n")
    Path("examples.npz").touch()
    return make_model(PICTURE)


def fresh_photos():
    model = photos()
    Path("examples.npz").unlink()
    return model


def packed_photos():
    model = fresh_photos()
    pack("photos", model, Path("examples.npz"))
    return model


def scenes():
    for index in (1, 2):
        write_image(Path("scenes") / f"{index}.png", seed=index)
        write_sound(Path("scenes") / f"{index}.wav", seed=index)
    table = next(block for block in blocks("A table of files") if block.startswith("image,audio"))
    (Path("scenes") / "examples.csv").write_text(table)
    return make_model(PICTURE, SOUND, TEXT)


def recordings():
    np.savez("recordings.npz", windows=np.random.default_rng(0).normal(size=(9, 2, 8)), label=np.arange(9) % 2)
    return make_model(MOTION)


def python_class():
    Path("my_examples.py").write_text("import numpy\n" + blocks("A Python class", "python")[0])
    return make_model(MOTION)


def captions():
    coco_tree(Path("coco"))
    return make_model(PICTURE, TEXT, classes=0)


def advance():
    advance_tree(Path("advance"))
    return make_model(PICTURE, SOUND)


SETS = {
    "Bring your own data": fresh_photos,
    "A table of files": scenes,
    "Arrays": recordings,
    "A Python class": python_class,
    "COCO captions": captions,
    "Class folders, such as ADVANCE": advance,
    "Labels and class names": photos,
    "The data card": packed_photos,
}


def test_every_section_with_a_command_has_its_data_set():
    assert {section for section in SECTIONS if commands(section)} == set(SETS)


@pytest.mark.parametrize("section", SETS)
def test_the_commands_of_the_page_run(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = SETS[section]()
    write_plan(Path("plan.json"), model)

    for line in commands(section):
        words = shlex.split(line)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"
        if words[1] == "pack":
            opened(Path(words[words.index("--out") + 1]), model, tmp_path / "scratch")


def test_the_scaling_of_the_page_is_legal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(Path("plan.json"), advance())
    options = re.findall(r"`(--mean \S+ --std \S+)`", PAGE)
    assert len(options) == 2
    line = f"data pack advance --for plan.json --out out.npz {' '.join(options)}"
    assert CliRunner().invoke(app, shlex.split(line)).exit_code == 0
    assert LocalData(Path("out.npz"), tmp_path / "s").train_examples
