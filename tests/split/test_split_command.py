"""`lamina split`: publish, join and status over a real coordinator; export is what the other tests call directly."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamina.cli.split import split
from lamina.errors import ConfigError
from tests.split.house import loopback, varied, write_data
from tests.split.test_split_plan import PLAN_FILE


def _run(*words: str) -> str:
    answer = CliRunner().invoke(split, list(words), catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def test_a_run_by_the_command_line(server_bundle: Path, tmp_path: Path) -> None:
    folder, _ = varied(server_bundle, tmp_path / "bundle", rounds=1, users={"size": 1, "evaluate_every": 1})
    data = write_data(tmp_path / "0.npz", seed=0, train=16, test=8)
    with loopback(tmp_path) as house:
        admin, enrolment = (["--token-file", str(p)] for p in (house.settings.admin_token, house.settings.enrolment_token))
        assert "no split run" in _run("status", house.url, *admin)
        run = _run("publish", str(folder), house.url, *admin).strip()
        options = ["--data", str(data), "--name", "user-0", "--engine", "onnxruntime", "--state", str(tmp_path / "user-0")]
        _run("join", house.url, *options, *enrolment, "--until-finished")
        shown = _run("status", house.url, run, *admin)
    assert "split-1: tiny, finished" in shown
    assert len([line for line in shown.splitlines() if line.count("%") == 3]) == 1  # one round: two modalities and fusion


def test_a_damaged_bundle_and_an_unknown_engine_are_refused(server_bundle: Path, tmp_path: Path) -> None:
    folder, manifest = varied(server_bundle, tmp_path / "bundle")
    (folder / "blobs" / next(iter(manifest.blobs))).unlink()
    with pytest.raises(ConfigError, match="is missing"):
        _run("publish", str(folder), "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="unknown engine 'onnx'"):
        _run("export", str(PLAN_FILE), "--out", str(tmp_path / "out"), "--engine", "onnx")
