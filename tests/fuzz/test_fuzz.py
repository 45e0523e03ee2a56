"""Thousands of hostile messages in both directions: none ends in an error that nobody named, and none costs memory.

Each side is attacked in a process of its own, so that the operating system can say what it cost.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
MESSAGES = [600, pytest.param(10_000, marks=pytest.mark.slow)]


def attack(side: str, messages: int) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tests.fuzz.{side}", "--messages", str(messages), "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


@pytest.mark.parametrize("messages", MESSAGES)
def test_a_coordinator_answers_hostile_requests_with_refusals_and_goes_on(messages):
    outcome = attack("coordinator", messages)
    assert outcome["server_errors"] == []
    assert outcome["tracebacks"] == 0
    assert outcome["growth_bytes"] < 16 * MIB
    assert outcome["has_finished"]
    statuses = {int(status): count for status, count in outcome["statuses"].items()}
    assert sum(statuses.values()) == messages
    assert statuses[422] > messages / 10  # the parsers were reached, not only what stands before them
    assert statuses[200] > messages / 50


@pytest.mark.parametrize("messages", MESSAGES)
def test_a_device_ends_hostile_answers_with_a_named_error_and_keeps_its_work(messages):
    outcome = attack("device", messages)
    assert outcome["unnamed"] == []
    assert outcome["growth_bytes"] < 32 * MIB
    assert outcome["has_kept_its_work"]
    assert sum(outcome["ends"].values()) == messages
    assert {"protocol", "hash-mismatch", "signature", "job"} <= set(outcome["ends"])
