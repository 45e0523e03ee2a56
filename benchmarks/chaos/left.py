"""What a run left behind at its coordinator, and how that differs from what another run left."""

import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lamina.bundles.bundle import hash_file

_UPDATES = """
select rounds.stage, rounds.round, devices.name, updates.content_sha256, updates.num_examples,
    json_extract(updates.report, '$.loss')
from updates join rounds on rounds.id = updates.round_id join devices on devices.id = updates.device_id
"""
_TOLD = re.compile(r"stage (\d+), round (\d+): trained .*update accepted")

Key = tuple[int, int, str]
"""Stage, round and device."""


@dataclass(frozen=True)
class Left:
    """`weights` has the sha256 of each segment's file as it lies on the disk; `updates` what was accepted, in any number;
    `told` the updates of which a device was told that they are."""

    weights: dict[str, str]
    updates: list[tuple[Key, tuple[str, int, float]]]
    told: set[Key]
    devices: int


def read_left(state: Path, logs: dict[str, str]) -> Left:
    """Of a coordinator that has ended. `logs` are what the devices said, by name."""
    with closing(sqlite3.connect(state / "coordinator.sqlite")) as database:
        rows = database.execute(_UPDATES).fetchall()
        weights = dict(database.execute("select segment, blob from weights").fetchall())
        (devices,) = database.execute("select count(*) from devices").fetchone()
    return Left(
        weights={segment: hash_file(state / "blobs" / blob) for segment, blob in sorted(weights.items())},
        updates=sorted(((row[0], row[1], row[2]), (row[3], row[4], row[5])) for row in rows),
        told={(int(stage), int(number), name) for name, log in logs.items() for stage, number in _TOLD.findall(log)},
        devices=devices,
    )


@dataclass(frozen=True)
class Difference:
    """Between a disturbed run and the same in peace. `lost` and `double` are updates, `other` those with another content."""

    lost: list[Key]
    double: list[Key]
    other: list[Key]
    segments: list[str]
    devices: int

    @property
    def is_none(self) -> bool:
        return not (self.lost or self.double or self.other or self.segments or self.devices)


def difference(disturbed: Left, calm: Left) -> Difference:
    """Update by update and segment by segment; `devices` is how many more were enrolled than there are."""
    times = Counter(key for key, _ in disturbed.updates)
    mine, reference = dict(disturbed.updates), dict(calm.updates)
    return Difference(
        lost=sorted((disturbed.told | reference.keys()) - mine.keys()),
        double=sorted(key for key, count in times.items() if count > 1),
        other=sorted(key for key, content in mine.items() if reference.get(key) != content),
        segments=[name for name in calm.weights if disturbed.weights.get(name) != calm.weights[name]],
        devices=disturbed.devices - calm.devices,
    )
