"""`lamina status` against the real service: who is missing, 80 columns, hostile text, JSON, and watching."""

import io
import json
import sqlite3

import pytest
import typer
from coordinator_harness import REPORT, FakeClock, InProcess, Process, make_bundle, work_until_finished
from rich.console import Console
from typer.testing import CliRunner

from lamina.cli.device_table import ago, missing_of
from lamina.cli.overview_tables import show_bundle
from lamina.cli.status import document, figure, screen_of, status, table_of
from lamina.cli.watching import lines_of, watch_lines, watch_screen
from lamina.client import Client, RunView, read_token
from lamina.errors import UnreachableError
from lamina.plans.plan import Cohort
from lamina.wire import DeviceList, DeviceState

HOSTILE = ("[/x]", "[bold red]", "\u001b]0;owned\u0007\u001b[2J", "\u202eevil", "a\nb\rc")


def client_of(coordinator: InProcess) -> Client:
    return Client("http://coordinator", read_token(coordinator.state / "admin.token"), transport=coordinator.http._transport)


def views_of(coordinator: InProcess) -> list[RunView]:
    client = client_of(coordinator)
    return [client.view(name) for name in client.runs().runs]


def drawn(renderable: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def waiting(coordinator: InProcess, clock: FakeClock) -> InProcess:
    """A run of four devices: pi-1 has sent, pi-2 is at work, pi-3 has gone and pi-4 never came."""
    coordinator.publish(make_bundle(cohort=Cohort(size=3, lease_seconds=1000)))
    pis = [coordinator.join(f"pi-{number}") for number in range(1, 5)]
    for device in pis[:3]:
        device.check_in()
    work = pis[0].work()
    pis[1].work(), pis[2].work()
    clock.jump(200)
    pis[1].check_in()
    assert pis[0].send(work, b"broken").status_code == 422
    pis[0].send(work)
    return coordinator


def test_the_missing_devices_are_named_with_what_each_did_last_and_when(waiting: InProcess) -> None:
    shown = drawn(screen_of(views_of(waiting)))
    assert "missing: pi-3 (update), pi-2 (update)" in shown
    rows = {line.split()[0]: " ".join(line.split()) for line in shown.splitlines() if line.strip().startswith("pi-")}
    assert list(rows) == ["pi-3", "pi-2", "pi-1"]
    assert "3 min ago update" in rows["pi-3"] and "took its place in round 0 of stage 0" in rows["pi-3"]
    assert "0 s ago" in rows["pi-2"] and "update" in rows["pi-2"]
    assert "sent its update of round 0" in shown and "refused, tensor-file: this is no valid" in shown


def test_a_cohort_that_lacks_devices_names_them_and_how_many_must_join(coordinator: InProcess, clock: FakeClock) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=4)))
    for name in ("pi-1", "pi-2"):
        coordinator.join(name).check_in()
        clock.jump(100)
    coordinator.join("pi-3").check_in()
    assert "missing: pi-1 (check-in), pi-2 (check-in); 1 more device must join" in drawn(screen_of(views_of(coordinator)))


@pytest.mark.parametrize("cohort", [1, 3])
def test_everything_fits_80_columns_and_no_header_is_cut(coordinator: InProcess, cohort: int) -> None:
    coordinator.publish(make_bundle(rounds=[2, 1], cohort=Cohort(size=cohort), encoding="int8", download_encoding="fp16"))
    known = {"encodings": ("fp32", "fp16", "int8"), "test_examples": 4}
    work_until_finished(coordinator, [coordinator.join(f"a-device-with-a-long-name-{n}", **known) for n in range(cohort)])
    shown = drawn(screen_of(views_of(coordinator)))
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "…" not in shown and "..." not in shown
    for word in ("stage", "round", "state", "updates", "train", "loss", "accuracy", "down", "up", "peak", "did last"):
        assert word in shown
    assert f"down {cohort} of {cohort} fp16, up {cohort} of {cohort} int8" in shown


def test_numbers_of_any_size_fit_their_columns() -> None:
    values = (0.0, 1e-9, 0.1234567, 9.99999, 12345.678, 1e9, 2.0**53, 1e39, 1e300, -1e39)
    assert all(len(figure(value, digits)) <= 8 for value in values for digits in (1, 3, 4))
    assert (figure(0.5, 4), figure(9.0, 1), figure(0.001, 3), figure(1234.5678, 3)) == ("0.5000", "9.0", "0.001", "1234.6")
    assert figure(None, 4) == "-"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_reaches_no_terminal(coordinator: InProcess, text: str) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
    device = coordinator.join("pi-1")
    report = REPORT.model_copy(update={"failed_attempts": 1, "failure": text})
    headers = {"Lamina-Report": json.dumps(report.model_dump())}
    assert device.send(device.work(), headers=headers).status_code == 200
    (view,) = views_of(coordinator)
    state = DeviceState(device="pi-1", is_here=True, awaited="update", did=text, refusal=text)
    hostile = RunView(
        status=view.status.model_copy(update={"detail": text, "name": text}),
        devices=DeviceList.model_construct(run="run-1", here=1, awaited=1, to_join=0, devices=(state,), more=0),
    )
    for shown in (drawn(screen_of([hostile])), lines_of([hostile])):
        assert not set("\u001b\u0007\u202e\r") & set(shown)
    shown = drawn(screen_of([hostile]))
    if text.startswith("["):
        assert f"pi-1: 1 failed attempts, {text}" in shown and f"run-1: {text}, finished" in shown


def test_a_peak_of_400_digits_in_the_database_does_not_break_the_table(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(cohort=Cohort(size=1)))
    device = coordinator.join("pi-1")
    device.send(device.work())
    coordinator.stop()
    with sqlite3.connect(coordinator.state / "coordinator.sqlite") as connection:
        report = REPORT.model_dump_json().replace("9000000", "9" * 400)
        connection.execute("UPDATE updates SET report = ?", (report,))
    connection.close()
    coordinator.start()
    assert "9.0e9" in drawn(table_of(coordinator.status()))


def test_the_document_has_every_field(waiting: InProcess) -> None:
    (run,) = json.loads(document(views_of(waiting)))["runs"]
    assert run["status"]["run"] == "run-1" and run["status"]["rounds"][0]["updates"][0]["device"] == "pi-1"
    states = {device["device"]: device for device in run["devices"]["devices"]}
    assert states["pi-3"]["awaited"] == "update" and states["pi-1"]["awaited"] == "none"
    assert states["pi-3"]["did_seconds"] == 200


def test_without_a_terminal_each_change_is_a_line_and_the_end_ends_it(
    coordinator: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=2)))
    a, b = coordinator.join("pi-a"), coordinator.join("pi-b")
    answers = iter(("", "a", "", "", "lost", "lost", "b", "send"))

    def sleep(_: float) -> None:
        """What happens between two looks."""
        step = next(answers)
        if step == "a":
            a.check_in()
        if step == "b":
            b.check_in()
        if step == "send":
            for device in (a, b):
                device.send(device.work())

    failing = iter((False, False, False, False, False, True, True, False, False, False))

    def look() -> list[RunView]:
        if next(failing):
            raise UnreachableError("the coordinator does not answer")
        return views_of(coordinator)

    watch_lines(look, lines_of, sleep)
    shown = capsys.readouterr()
    lines = [line.partition(" ")[2] for line in shown.out.splitlines()]
    assert lines[0] == (
        "run-1 running: stage 0 round 0 waits for its cohort; 0 devices are here; missing: pi-a (check-in), pi-b (check-in)"
    )
    assert lines[1].endswith("1 devices are here; missing: pi-b (check-in)")
    assert lines[-1].startswith("run-1 finished")
    assert len(lines) == 4
    assert shown.err.count("no answer, asking again") == 1


def test_a_screen_is_redrawn_until_the_run_has_ended(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
    device = coordinator.join("pi-a")
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=60)
    watch_screen(lambda: views_of(coordinator), screen_of, console, lambda _: [device.step(), None][1])
    shown = console.file.getvalue()
    assert "missing: pi-a (check-in)" in shown and "run-1: tiny_plan, finished" in shown


def test_an_older_coordinator_has_no_devices_to_tell_of(coordinator: InProcess) -> None:
    coordinator.publish(make_bundle())
    coordinator.app.router.routes = [route for route in coordinator.app.router.routes if "devices" not in route.path]
    (view,) = views_of(coordinator)
    assert view.devices is None and "run-1: tiny_plan, running" in drawn(screen_of([view]))


def test_the_command_prints_one_document_and_watches_to_the_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    served = Process(tmp_path_factory.mktemp("served") / "state")
    try:
        served.publish(make_bundle(rounds=[1, 0], cohort=Cohort(size=1)))
        work_until_finished(served, [served.join("pi-1")])
        app = typer.Typer()
        app.command()(status)

        def run(*options: str) -> str:
            arguments = [served.url, "--token-file", str(served.state / "admin.token"), *options]
            return CliRunner().invoke(app, arguments).output

        assert json.loads(run("--json"))["runs"][0]["status"]["state"] == "finished"
        assert json.loads(run("--json", "--watch"))["runs"][0]["devices"]["devices"][0]["device"] == "pi-1"
        assert "run-1 finished" in run("run-1", "--watch")
    finally:
        served.terminate()


def test_times_and_names_in_words() -> None:
    assert [ago(each) for each in (None, 0, 59, 119, 120, 3600, 86400 * 3)] == [
        "", "0 s ago", "59 s ago", "119 s ago", "2 min ago", "1 h ago", "3 d ago",
    ]  # fmt: skip
    many = tuple(DeviceState(device=f"pi-{n:02}", is_here=False, awaited="check_in") for n in range(50))
    told = missing_of(DeviceList(run="run-1", here=0, awaited=2000, devices=many, more=1950))
    assert told.startswith("pi-00 (check-in)") and told.endswith("and 1992 more") and len(told) < 300
    assert missing_of(DeviceList(run="run-1", here=0, to_join=2)) == "2 devices must join"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_foreign_bundle_s_notes_are_shown_as_they_stand(text: str) -> None:
    manifest = make_bundle(strategy="end_to_end").manifest.model_copy(update={"notes": (text,)})
    console = Console(file=io.StringIO(), width=80, highlight=False)
    show_bundle(manifest, "0" * 64, console)
    shown = console.file.getvalue()
    assert not set("\u001b\u0007\u202e\r") & set(shown)
    if text.startswith("["):
        assert text in shown
