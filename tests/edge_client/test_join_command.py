import pytest
import typer
from typer.testing import CliRunner

from lamina.cli.join import join
from lamina.errors import ConfigError, DataError


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(join)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)], terminal_width=200)


@pytest.fixture
def device(monkeypatch):
    """Records what the device is told to do instead of doing it."""
    calls = []
    monkeypatch.setattr("edge_client.device.join", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


def options(folder, engine="onnxruntime"):
    return ["http://c", "--data", folder / "d.npz", "--name", "attic", "--engine", engine, "--state", folder / "s"]


def test_every_option_reaches_the_device(command, device, tmp_path):
    (tmp_path / "token").write_text("secret")
    done = command(*options(tmp_path), "--token-file", tmp_path / "token", "--run", "r1", "--until-finished")
    assert done.exit_code == 0
    (((url, data, name, engine, state, token), rest),) = device
    assert (url, data, name, engine, state) == ("http://c", tmp_path / "d.npz", "attic", "onnxruntime", tmp_path / "s")
    assert token() == "secret"
    assert rest == {"run": "r1", "until_finished": True}


def test_without_options_the_device_takes_any_run_and_stays(command, device, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_TOKEN", "from-environment")
    assert command(*options(tmp_path)).exit_code == 0
    (((*_, token), rest),) = device
    assert token() == "from-environment"
    assert rest == {"run": None, "until_finished": False}


def test_an_unknown_engine_is_refused(command, device, tmp_path):
    done = command(*options(tmp_path, engine="tensorflow"))
    assert isinstance(done.exception, ConfigError)
    assert "executorch, onnxruntime, torch" in done.exception.message
    assert device == []


def test_errors_are_those_of_lamina(command, tmp_path):
    assert isinstance(command(*options(tmp_path)).exception, DataError)


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
    ):
        assert words in text
