import pytest
import typer
from typer.testing import CliRunner

from edge_client.talk.device import Options
from lamina.cli.join import join
from lamina.errors import ConfigError


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(join)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)], terminal_width=200)


@pytest.fixture
def device(monkeypatch):
    """Records what the device is told to do instead of doing it."""
    calls = []
    monkeypatch.setattr("edge_client.process.start.start", calls.append)
    return calls


KEY = "lamina-ed25519:d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"


def options(folder, engine="onnxruntime"):
    return ["http://c", "--data", folder / "d.npz", "--name", "attic", "--engine", engine, "--state", folder / "s"]


def test_every_option_reaches_the_device(command, device, tmp_path):
    more = ("--run", "r1", "--until-finished", "--disk-mb", "3", "--trust", KEY, "--allow-unsigned", "--stall-minutes", "7")
    done = command(*options(tmp_path), "--token-file", tmp_path / "token", *more)
    assert done.exit_code == 0, done.output
    assert device == [
        {
            "url": "http://c",
            "data": str(tmp_path / "d.npz"),
            "name": "attic",
            "engine": "onnxruntime",
            "state": str(tmp_path / "s"),
            "token_file": str(tmp_path / "token"),
            "run": "r1",
            "until_finished": True,
            "is_resident": False,
            "disk_bytes": 3_000_000,
            "trust": [KEY],
            "allow_unsigned": True,
            "stall_seconds": 420.0,
        }
    ]
    assert Options(**device[0]).has_worked is False


def test_without_options_the_device_takes_any_run_and_stays(command, device, tmp_path):
    assert command(*options(tmp_path)).exit_code == 0
    (given,) = device
    assert [given[key] for key in ("token_file", "run", "until_finished", "disk_bytes")] == [None, None, False, None]
    assert (given["trust"], given["allow_unsigned"]) == ([], False)


def test_what_is_no_public_key_is_refused_before_anything_starts(command, device, tmp_path):
    done = command(*options(tmp_path), "--trust", KEY[:-1])
    assert isinstance(done.exception, ConfigError) and "is no public key" in done.exception.message
    assert device == []


def test_an_unknown_engine_is_refused(command, device, tmp_path):
    done = command(*options(tmp_path, engine="tensorflow"))
    assert isinstance(done.exception, ConfigError)
    assert "executorch, onnxruntime, torch" in done.exception.message
    assert device == []


def test_every_parameter_has_help(command):
    text = command("--help").output
    for words in (
        "Address of the coordinator",
        "--data",
        "--name",
        "--engine",
        "--state",
        "--token-file",
        "--run",
        "LAMINA_TOKEN",
        "--disk-mb",
        "--trust",
        "--allow-unsigned",
    ):
        assert words in text
