"""`lamina publish` and `lamina status`, and the small client behind them, against the real service."""

from pathlib import Path

import httpx
import pytest
import typer
from coordinator_harness import Bundle, Device, InProcess, Process, make_bundle, work_until_finished
from typer.testing import CliRunner

from lamina.cli.publish import publish
from lamina.cli.serve import serve
from lamina.cli.status import status
from lamina.client import TOKEN_VARIABLE, Client, read_token
from lamina.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    LaminaError,
    NotEnrolledError,
    ProtocolError,
    UnknownNameError,
    UnreachableError,
    all_errors,
)
from lamina.plans.plan import Cohort
from lamina.wire import Problem


def client_of(coordinator: InProcess) -> Client:
    token = read_token(coordinator.state / "admin.token")
    return Client("http://coordinator", token, transport=coordinator.http._transport)


def test_publishing_sends_what_is_missing_and_counts_every_byte(coordinator: InProcess, tmp_path: Path) -> None:
    bundle = make_bundle()
    folder = bundle.write(tmp_path / "bundle")
    counted: list[int] = []
    client = client_of(coordinator)

    assert client.publish(folder, bundle.manifest, counted.append).run == "run-1"
    assert sum(counted) == sum(bundle.manifest.blobs.values())
    assert client.publish(folder, bundle.manifest, counted.append).run == "run-2"
    assert sum(counted) == 2 * sum(bundle.manifest.blobs.values())
    assert client.runs().runs == ("run-1", "run-2")
    assert client.run("run-1") == coordinator.status()


def test_publishing_again_sends_no_blob_twice(coordinator: InProcess, tmp_path: Path) -> None:
    bundle = make_bundle()
    folder = bundle.write(tmp_path / "bundle")
    client = client_of(coordinator)
    client.publish(folder, bundle.manifest)
    for path in (folder / "blobs").iterdir():
        path.unlink()  # could not be read, so it is not
    assert client.publish(folder, bundle.manifest).run == "run-2"


def test_refusals_become_the_errors_of_lamina(coordinator: InProcess, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="run-9"):
        client_of(coordinator).run("run-9")
    stranger = Client("http://coordinator", "wrong", transport=coordinator.http._transport)
    with pytest.raises(NotEnrolledError):
        stranger.runs()
    with pytest.raises(NotEnrolledError):
        stranger.has_blob("0" * 64)
    bundle = make_bundle()
    with pytest.raises(NotEnrolledError):
        stranger.publish(bundle.write(tmp_path / "bundle"), bundle.manifest)


@pytest.mark.parametrize("code", sorted(all_errors()))
def test_every_code_becomes_its_class(code: str) -> None:
    body = Problem(code=code, title="t", status=400, detail="what happened").model_dump_json()
    transport = httpx.MockTransport(lambda request: httpx.Response(400, content=body))
    with pytest.raises(LaminaError, match="what happened") as caught:
        Client("http://x", "t", transport).runs()
    assert type(caught.value) is all_errors()[code]


def test_an_answer_of_something_else_is_told_as_such() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="<html>bad gateway</html>"))
    with pytest.raises(ProtocolError, match=r"status 502.*no problem document"):
        Client("http://x", "t", transport).runs()
    unknown = Problem(code="from-the-future", title="t", status=418, detail="new").model_dump_json()
    transport = httpx.MockTransport(lambda request: httpx.Response(418, content=unknown))
    with pytest.raises(ProtocolError, match="new"):
        Client("http://x", "t", transport).runs()


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9"), Client("http://127.0.0.1:9", "t") as client:
        client.runs()


@pytest.mark.parametrize("url", ["", "localhost:8763", "ftp://x", "http://", "http://[::1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Client(url, "t")


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" secret\n")
    (tmp_path / "empty").write_text("\n")
    assert read_token(tmp_path / "token", {TOKEN_VARIABLE: "other"}) == "secret"
    assert read_token(None, {TOKEN_VARIABLE: "other"}) == "other"
    for path, environment in ((tmp_path / "empty", {}), (tmp_path / "none", {}), (None, {}), (None, {TOKEN_VARIABLE: " "})):
        with pytest.raises(ConfigError, match="token"):
            read_token(path, environment)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """A coordinator in a process of its own."""
    coordinator = Process(tmp_path_factory.mktemp("served") / "state")
    yield coordinator
    coordinator.terminate()


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Bundle, Path]:
    made = make_bundle(cohort=Cohort(size=1))
    return made, made.write(tmp_path / "bundle")


def call(command, *arguments: object, token: Path | None = None, environment: dict[str, str] | None = None):
    app = typer.Typer()
    app.command()(command)
    options = ["--token-file", str(token)] if token else []
    runner = CliRunner(env={"COLUMNS": "200", TOKEN_VARIABLE: "", **(environment or {})})
    return runner.invoke(app, [*map(str, arguments), *options])


def test_a_bundle_is_published_and_its_run_shown(served: Process, bundle: tuple[Bundle, Path]) -> None:
    token = served.state / "admin.token"
    assert "no run was published yet" in call(status, served.url, token=token).output

    published = call(publish, bundle[1], served.url, token=token)
    assert published.exit_code == 0 and published.stdout.split() == ["run-1"]
    assert "signed by key" in published.stderr and "(default, a key of this machine)" in published.stderr
    waiting = call(status, served.url, "run-1", environment={TOKEN_VARIABLE: token.read_text()})
    assert "run-1: tiny_plan, running" in waiting.output and "0 of 1 devices are here" in waiting.output

    device: Device = served.join("phone", test_examples=4)
    work_until_finished(served, [device])
    shown = call(status, served.url, token=token).output
    assert "run-1: tiny_plan, finished" in shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert cells == [[stage, "0", "closed", "1", "0.5000", "0.7500", "0.001", "0.001", "9.0"] for stage in ("0", "1")]


def test_an_altered_bundle_is_not_published(served: Process, bundle: tuple[Bundle, Path]) -> None:
    token = served.state / "admin.token"
    blob = min((bundle[1] / "blobs").iterdir())
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    failed = call(publish, bundle[1], served.url, token=token)
    assert isinstance(failed.exception, HashMismatchError) and blob.name in str(failed.exception)
    blob.unlink()
    failed = call(publish, bundle[1], served.url, token=token)
    assert isinstance(failed.exception, BundleError) and blob.name in str(failed.exception)


def test_without_a_token_nothing_is_tried(served: Process, bundle: tuple[Bundle, Path]) -> None:
    for command, arguments in ((publish, (bundle[1], served.url)), (status, (served.url,))):
        assert isinstance(call(command, *arguments).exception, ConfigError)


@pytest.mark.parametrize("command", [serve, publish, status])
def test_every_argument_has_help_and_none_is_a_token(command) -> None:
    shown = call(command, "--help").output
    assert command.__doc__.splitlines()[0] in shown
    assert "--token " not in shown
    for parameter in typer.main.get_params_from_function(command).values():
        assert parameter.annotation is not None
    click = typer.main.get_command(_app(command))
    assert all(getattr(parameter, "help", None) for parameter in click.params if parameter.name != "help")


def _app(command) -> typer.Typer:
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return app
