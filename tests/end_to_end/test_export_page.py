"""docs/export.md as it stands: its files are written, its commands run in order, and at the end there are trained models."""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lamina.cli.main import app
from tests.export.adapters.timm_beside_cpu_torch import import_timm, import_transformers

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
WALK = PAGE[: PAGE.index("## Keys of a plan file")]
SECONDS = 240
WORDS = {"sea": "wave salt ship sail", "kitchen": "pan stove salt spoon", "forest": "tree moss deer fern"}


def blocks():
    """(language, text) of each code block of the walk, in order."""
    return [(found[1], found[2]) for found in re.finditer(r"^```(\w*)\n(.*?)^```", WALK, re.MULTILINE | re.DOTALL)]


def write_photos(folder: Path) -> None:
    """Bright in the upper half, in the lower half, or all over: what a small model can learn."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lines = ["image,label"]
    for number in range(36):
        kind = number % 3
        pixels = random.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        pixels[: 20 if kind == 0 else 40, :][20 if kind == 1 else 0 :] += 150
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{('upper', 'lower', 'whole')[kind]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def write_texts(folder: Path) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = [
        f"{' '.join(random.permutation(words.split())[:3])} {number},{label}"
        for number in range(12)
        for label, words in WORDS.items()
    ]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_photos(tmp_path / "photos")
    write_texts(tmp_path / "texts")
    return tmp_path


@pytest.mark.slow
def test_the_page_works_from_the_first_line_to_the_last(place):
    import_timm()
    import_transformers()
    port = free_port()
    ran = []
    with contextlib.ExitStack() as stack:
        for language, text in blocks():
            if language in ("python", "toml"):
                name = text.splitlines()[0].removeprefix("# ")
                (place / name).write_text(text)
                continue
            for line in text.splitlines():
                words = shlex.split(line.replace("8763", port))[1:]
                ran.append(words[0])
                if words[0] == "serve":
                    start_coordinator(words, place, stack)
                elif words[0] == "join":
                    done = subprocess.run(
                        [sys.executable, "-m", "lamina.cli.main", *words], capture_output=True, text=True, timeout=SECONDS
                    )
                    assert done.returncode == 0, done.stdout + done.stderr
                    assert "finished" in done.stdout + done.stderr
                else:  # in this process, where timm can be imported
                    found = CliRunner().invoke(app, words, catch_exceptions=False)
                    assert found.exit_code == 0, f"{line}\n{found.output}"
    assert ran.count("assemble") == 2
    for name in ("vit-model", "bert-model"):
        assert {path.name for path in (place / name).iterdir()} >= {"model.pt", "model.onnx", "model.pte", "model.json"}


def start_coordinator(words, place, stack):
    log = stack.enter_context((place / "coordinator.log").open("wb"))
    process = subprocess.Popen([sys.executable, "-m", "lamina.cli.main", *words], stdout=log, stderr=log, env=dict(os.environ))
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    address = place / "coordinator" / "address"
    for _ in range(600):
        if address.is_file():
            return
        assert process.poll() is None, (place / "coordinator.log").read_text()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    raise AssertionError("the coordinator did not start")
