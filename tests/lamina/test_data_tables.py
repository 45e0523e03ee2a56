"""Tables are read as people save them, with any separator, encoding and line end; what cannot be read is named by its line."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lamina.cli.main import app
from lamina.data.models import load_model
from lamina.data.pack import Options, check
from lamina.data.tables import find_form, read_numbers, table_rows
from lamina.errors import ConfigError, DataError
from tests.lamina.trees import MOTION, PICTURE, TEXT, make_model, write_image

ALL_TRAIN = Options(test_share=None)


def photos(folder, text, encoding="utf-8", name="examples.csv"):
    for index in range(4):
        write_image(folder / f"{index}.png", seed=index)
    (folder / name).write_bytes(text.encode(encoding))
    return folder


ROWS = ["file,label", "0.png,cat", "1.png,dog", "2.png,cat", "3.png,dog"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["examples.csv", "examples.tsv", "EXAMPLES.CSV"])
def test_every_usual_form_of_a_table_is_read(tmp_path, separator, encoding, end, name):
    text = end.join(row.replace(",", separator) for row in ROWS) + end
    report = check(str(photos(tmp_path, text, encoding, name)), make_model(PICTURE), ALL_TRAIN)
    assert report.faults.lines() == [] and report.classes["train"] == [2, 2] and report.names == ("cat", "dog")


def test_a_spreadsheet_says_its_separator_and_lines_are_counted_all_the_same(tmp_path):
    text = "sep=;\nfile;label\n0.png;cat\n1.png;\n2.png;dog\n"
    report = check(str(photos(tmp_path, text)), make_model(PICTURE), ALL_TRAIN)
    assert [line.split(":")[0] for line in report.faults.lines()] == ["examples.csv line 4 (1.png)"]


def test_a_separator_within_the_texts_does_not_count(tmp_path):
    (tmp_path / "t.csv").write_text('text;label\n"one, two; three";a\n"two\nlines";b\nfour, five;a\n,;b\n')
    report = check(str(tmp_path / "t.csv"), make_model(TEXT), ALL_TRAIN)
    assert not report.faults.total and report.examples["train"] == 4
    rows = list(table_rows(tmp_path / "t.csv", find_form(tmp_path / "t.csv", {"text", "label"})))
    assert [line for line, _ in rows] == [1, 2, 3, 5, 6]  # where each begins


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            "file;label\n0.png;caf\u00e9\n".encode("latin-1"),
            "examples.csv line 2 is not UTF-8 text: byte 0xe9; save it as UTF-8",
        ),
        ("f\u00e9,label\n".encode("latin-1"), "examples.csv line 1 is not UTF-8 text"),
        ("file,label\n".encode("utf-16-le"), "has zero bytes, so it is no text, or UTF-16 without its mark; save it as UTF-8"),
        ("file,label\n".encode("utf-16")[:-1], "is no whole UTF-16.* text"),
        (b"file,label,label\n0.png,a,b\n", "has two columns 'label'"),
        (b"file,label\n0.png," + b"x" * 200_000 + b"\n", "examples.csv line 2: field larger than field limit"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_line(tmp_path, data, words):
    (tmp_path / "examples.csv").write_bytes(data)
    with pytest.raises(DataError, match=words):
        check(str(tmp_path), make_model(PICTURE), ALL_TRAIN)


def test_a_quotation_mark_that_does_not_end_is_named_where_it_begins(tmp_path):
    text = 'file,label\n0.png,cat\n"1.png,dog\n2.png,cat\n3.png,dog\n'
    report = check(str(photos(tmp_path, text)), make_model(PICTURE, classes=2), Options(test_share=None, classes="cat,dog"))
    (fault,) = report.faults.lines()
    assert "line 3: has more or fewer cells" in fault and "does not end" in fault
    assert report.left_out == 4


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1.5,-2\n3,4e1\n", ()),
        ("x;y\n1,5;-2\n3;4e1\n", ("x", "y")),
        ("x\ty\r\n1,5\t-2\r\n3,0\t40\r\n", ("x", "y")),
        ("1,5|-2\n3|40\n", ()),
        ("sep=;\n1.5;-2\n3;40\n", ()),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_numbers_are_read_with_any_separator_and_decimal_commas(tmp_path, text, names, encoding):
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    rows, columns = read_numbers(tmp_path / "x.csv")
    np.testing.assert_array_equal(rows, [[1.5, -2], [3, 40]])
    assert columns == names


RECIPE = """
name = "birds"
classes = 2

[encoders.image]
input = { kind = "image_patches", channels = 3, height = 8, width = 12, patch = 4 }
width = 8
heads = 2
layers = 2
"""


def test_a_short_recipe_says_the_model_without_torch(tmp_path, monkeypatch):
    (tmp_path / "plan.toml").write_text(RECIPE)
    folder = photos(tmp_path / "d", "\n".join(ROWS))
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    arguments = ["data", "pack", str(folder), "--for", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "out.npz")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and (tmp_path / "out.npz").is_file(), result.output


def test_a_recipe_of_a_module_of_ones_own_is_made_to_see_its_shapes(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem = nn.Linear(8, 4)\n"
        "        self.layers = nn.ModuleList([nn.Linear(4, 4)])\n"
        "        self.norm, self.input = nn.LayerNorm(4), Values(shape=(2, 8))\n"
        "from lamina.plans.model import Values\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plan.toml").write_text('name = "own"\nclasses = 2\n[encoders.motion]\nfactory = "own_net:Net"\n')
    np.savez("in.npz", motion=np.random.default_rng(0).normal(size=(9, 2, 8)), label=np.arange(9) % 2)
    result = CliRunner().invoke(app, ["data", "check", "in.npz", "--for", "plan.toml"])
    assert result.exit_code == 0 and "no faults" in result.output, (result.output, result.exception)
    with pytest.raises(ConfigError, match="give the bundle"):
        load_model(tmp_path / "plan.toml")


@pytest.mark.parametrize("pattern", ["*.json", "*.toml"])
def test_every_plan_file_of_the_benchmarks_is_one_for_data(pattern):
    def stands_for(path):
        return make_model(MOTION)

    files = sorted((Path(__file__).parents[2] / "benchmarks" / "plans").rglob(pattern))
    assert files and all(load_model(path, stands_for) for path in files)
