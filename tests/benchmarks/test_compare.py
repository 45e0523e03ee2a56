"""Results side by side, their plots, and the commands."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.device import plot
from benchmarks.device.compare import common_rows, comparison_charts, read_all
from benchmarks.device.plot import check_plot_path, draw, result_charts
from benchmarks.device.results import MemoryResult, Row, read_result, write_result
from benchmarks.device.tables import comparison_table, result_table
from lamina.cli.main import app
from lamina.errors import ConfigError

MIB = 2**20


def row(case: str, peak: int | None, seconds: float | None = 0.1, side: str = "onnxruntime", **more: object) -> Row:
    facts = {"status": "ok" if peak else "killed", "detail": "" if peak else "the out-of-memory killer ended it"} | more
    return Row(
        workload="vit12",
        side=side,  # type: ignore[arg-type]
        case=case,
        optimizer="sgd",
        batch=16,
        peak_rss_bytes=peak and peak * MIB,
        cpu_seconds_per_step=seconds,
        **facts,  # type: ignore[arg-type]
    )


def result(model: str, *rows: Row) -> MemoryResult:
    return MemoryResult(command="c", machine={"model": model}, versions={}, prepared={}, sensors="no energy", rows=rows)


JETSON = result("Jetson <Orin> & Co", row("full", None, None), row("cut", 100, 0.4, joules_per_step=1.5), row("flagged", 150))
LAPTOP = result("Laptop", row("full", 800, 0.2), row("cut", 80, 0.1))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "laptop.json", tmp_path / "jetson.json"]
    for path, content in zip(paths, (LAPTOP, JETSON), strict=True):
        write_result(path, content)
    return [str(path) for path in paths]


def test_rows_of_two_machines_meet_by_case_and_get_a_ratio_to_the_first(files) -> None:
    names, results = read_all([Path(file) for file in files])
    lines = common_rows(names, results)

    assert names == ["laptop", "jetson"]
    assert [[row and row.case for row in line] for line in lines] == [["full", "full"], ["cut", "cut"]]
    console = Console(record=True, width=140)
    console.print(comparison_table(names, results, lines))
    text = console.export_text()
    assert "100 (1.25)" in text and "400.0 (4.00)" in text
    assert "killed" in text


def test_the_table_of_one_machine_says_how_far_below_end_to_end_a_case_is() -> None:
    console = Console(record=True, width=140)
    eager = row("full", 1600, side="eager")
    console.print(result_table(result("Laptop", eager, *LAPTOP.rows), "vit12"))
    text = console.export_text()

    assert "10.00" in text and "20.00" in text  # 800 / 80 on the same engine, 1600 / 80 against eager


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "it is not JSON"),
        ("[1]", "its `kind` is not"),
        ('{"command": "make bench-engines", "rows": []}', "its `kind` is not"),
        ('{"kind": "lamina-bench-memory", "format": 2}', "has format 2, this lamina reads format 1"),
        ('{"kind": "lamina-bench-memory", "format": 1, "rows": [{}]}', "is a damaged result"),
    ],
)
def test_a_file_that_is_no_result_is_refused_with_its_name(tmp_path: Path, files, content: str, words: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"other\.json") as caught:
        read_all([Path(files[0]), path])
    assert words in caught.value.message


def test_nothing_to_compare_is_an_error(tmp_path: Path, files) -> None:
    other = tmp_path / "other.json"
    write_result(other, result("Phone", row("cut", 50, side="executorch")))

    with pytest.raises(ConfigError, match=r"no case in common.*vit12/executorch/cut"):
        common_rows(*read_all([Path(files[0]), other]))
    with pytest.raises(ConfigError, match="at least two"):
        read_all([other])
    with pytest.raises(ConfigError, match="does not exist"):
        read_all([other, tmp_path / "absent.json"])


class Page(HTMLParser):
    """Counts tags, checks that they nest, and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_plot_nests_loads_nothing_and_holds_every_bar(tmp_path: Path, files) -> None:
    path = tmp_path / "plot.html"
    done = CliRunner().invoke(app, ["bench", "compare", *files, "--plot", str(path)])
    assert done.exit_code == 0, done.output
    page = Page()
    page.feed(path.read_text())

    assert page.open == [] and page.loads == []
    assert page.count["svg"] == 3  # memory, time, energy
    assert "Jetson <Orin> & Co" in page.text
    charts = comparison_charts(["laptop", "jetson"], common_rows(["laptop", "jetson"], [LAPTOP, JETSON]))
    bars = sum(value is not None for chart in charts for group in chart.groups for value in group.values)
    assert page.count["rect"] == bars + 3 * 2  # and two legends a chart
    assert "url(" not in path.read_text() and "@import" not in path.read_text()


def test_the_png_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "plot.png"
    draw(result_charts(JETSON), "headline", [], path)

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_measuring(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.html"):
        check_plot_path(tmp_path / "plot.pdf")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        check_plot_path(tmp_path / "plot.png")
    check_plot_path(tmp_path / "plot.html")


def test_bench_memory_measures_a_prepared_folder(prepared, tmp_path: Path) -> None:
    folder, _ = prepared
    out, drawn = tmp_path / "r.json", tmp_path / "r.html"
    options = ["--case", "cut,+int8", "--engine", "onnxruntime", "--optimizer", "adamw", "--steps", "1"]
    done = CliRunner().invoke(
        app, ["bench", "memory", "--bundle", str(folder), *options, "--output", str(out), "--plot", str(drawn)]
    )

    assert done.exit_code == 0, done.output
    found = read_result(out)
    assert [(row.case, row.micro_batch, row.status) for row in found.rows] == [("cut", None, "ok"), ("+int8", 4, "ok")]
    assert found.machine["cores"] and found.machine["ram_bytes"] and found.machine["page_bytes"]
    assert found.versions["numpy"] and found.command
    assert drawn.exists()
    assert json.loads(out.read_text())["kind"] == "lamina-bench-memory"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workload", "vit99"], "'vit99' is not known; known: pair, tiny, vit12"),
        (["--case", "half"], "'half' is not known"),
        (["--workload", "tiny", "--batch", "4,x"], "give positive whole numbers"),
        (["--workload", "tiny", "--stage", "first"], "numbers of blocks or `last`"),
        (["--plot", "x.pdf"], "must end in .png or .html"),
        (["--bundle", "/nowhere"], "has no bench.json"),
    ],
)
def test_options_that_cannot_work_are_refused(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", "memory", *options])

    assert isinstance(done.exception, ConfigError)
    assert words in done.exception.message
