"""The whole house over real processes: different engines in one round, and kill -9 of either side in the middle of one."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from typer.testing import CliRunner

from lamina.bundles.bundle import hash_file
from lamina.bundles.manifest import Manifest
from lamina.cli.main import app
from lamina.wire import RunStatus
from tests.end_to_end.conftest import ENGINES, House

MakeHouse = Callable[[str], House]


def test_two_engines_train_every_round_together_to_a_model_that_has_learnt(undisturbed: RunStatus) -> None:
    assert [(row.stage, row.round, row.state) for row in undisturbed.rounds] == [
        (0, 0, "closed"),
        (1, 0, "closed"),
        (2, 0, "closed"),
        (2, 1, "closed"),
    ]
    for row in undisturbed.rounds:
        assert sorted((update.device, update.engine) for update in row.updates) == [
            (f"device-{index}", engine) for index, engine in enumerate(ENGINES)
        ]
        assert row.test_examples == 80
    last = undisturbed.rounds[-1].test_accuracy
    assert last is not None and last > 0.8  # four classes: chance is 0.25


def test_a_later_stage_moves_weights_and_no_programs(undisturbed: RunStatus, bundle: tuple[object, Manifest]) -> None:
    """Stage 2 uses the programs of stage 1; its second round needs the aggregate of the first and nothing else."""
    stages = bundle[1].stages
    assert stages[2].train == stages[1].train and stages[2].eval == stages[1].eval
    cost = stages[2].cost
    assert set(cost.program_bytes.values()) == {0}
    for update in undisturbed.rounds[-1].updates:
        # Besides the weights come control messages, more of them the slower the machine. A device that fetched programs would
        # fetch both of its engine's.
        programs = sum(bundle[1].blobs[each[update.engine]] for each in (stages[2].train, stages[2].eval))
        assert cost.round_bytes_down <= update.report.bytes_down < cost.round_bytes_down + programs
        assert cost.round_bytes_up <= update.report.bytes_up < cost.round_bytes_up + 10_000


def test_every_update_reports_what_it_cost(undisturbed: RunStatus) -> None:
    for row in undisturbed.rounds:
        for update in row.updates:
            assert update.report.num_examples == 100
            assert update.report.train_seconds > 0
            assert 20 * 2**20 < update.report.peak_bytes < 2 * 2**30


def test_a_coordinator_killed_in_the_middle_of_a_round_goes_on_to_the_same_weights_and_pull_fetches_them(
    make_house: MakeHouse, undisturbed: RunStatus
) -> None:
    """The devices join in the other order, which changes nothing either."""
    house = make_house("coordinator-killed")
    house.start_coordinator()
    run = house.publish()
    for index in reversed(range(len(ENGINES))):
        house.start_device(index)
    house.wait_until(lambda: _updates(house.status(run)) >= 1, "the first update is accepted")
    before = house.status(run)

    house.kill("coordinator")
    time.sleep(0.5)  # both devices meet a coordinator that does not answer
    house.start_coordinator()
    after = house.finish(run)

    assert before.state == "running"
    assert after.weights == undisturbed.weights
    assert [len(row.updates) for row in after.rounds] == [2, 2, 2, 2]
    out, token = house.folder / "weights", house.state / "admin.token"
    pulled = CliRunner().invoke(app, ["pull", house.url, run, "--out", str(out), "--token-file", str(token)])
    assert pulled.exit_code == 0, pulled.output
    assert {path.stem: hash_file(path) for path in out.iterdir()} == undisturbed.weights


def test_a_device_killed_in_the_middle_of_training_goes_on_to_the_same_weights(
    make_house: MakeHouse, undisturbed: RunStatus, bundle: tuple[object, Manifest]
) -> None:
    house = make_house("device-killed")
    program = house.folder / "device-0" / "blobs" / bundle[1].stages[0].train[ENGINES[0]]
    house.start_coordinator()
    run = house.publish()
    for index in range(len(ENGINES)):
        house.start_device(index)
    house.wait_until(program.exists, "device-0 has its training program")
    time.sleep(0.2)  # into local training, which takes a second

    house.kill("device-0")
    assert "device-0" not in _devices_in_round(house.status(run), 0)
    house.start_device(0)
    after = house.finish(run)

    assert after.weights == undisturbed.weights


def test_a_training_process_that_dies_is_a_failed_attempt_and_the_run_ends_with_the_same_weights(
    make_house: MakeHouse, undisturbed: RunStatus
) -> None:
    """A crash of the runtime, an abort, and what the kernel does when memory runs out; each in another round."""
    house = make_house("trainer-killed")
    house.start_coordinator()
    run = house.publish()
    for index in range(len(ENGINES)):
        house.start_device(index)
    for round, number in enumerate((signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL)):
        house.wait_until(lambda round=round: len(house.status(run).rounds) > round, f"round {round} has begun")  # type: ignore[misc]
        house.wait_until(lambda: bool(_trainers(house.folder / "device-0")), "device-0 trains")
        for process in _trainers(house.folder / "device-0"):
            os.kill(process, number)
    after = house.finish(run)

    assert after.weights == undisturbed.weights
    log = (house.folder / "device-0.log").read_text()
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
        assert f"failed, it was ended by {number.name}" in log


def _trainers(state: Path) -> list[int]:
    """Training processes of the device with this state folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"edge_client.train.trainer" in words and str(state / "work").encode() in words:
                    found.append(int(entry.name))
    return found


def _updates(status: RunStatus) -> int:
    return sum(len(row.updates) for row in status.rounds)


def _devices_in_round(status: RunStatus, index: int) -> set[str]:
    return {update.device for update in status.rounds[index].updates} if len(status.rounds) > index else set()
