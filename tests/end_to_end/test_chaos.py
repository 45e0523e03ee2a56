"""The short form of `make chaos`: real processes that are killed, cut off and lied to end where those in peace do."""

import asyncio
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

from benchmarks.chaos.faults import draw
from benchmarks.chaos.left import Left, difference
from benchmarks.chaos.plan import small_plan
from benchmarks.chaos.proxy import Proxy
from benchmarks.chaos.storms import storms

KILLS, TIMEOUT_SECONDS = 3, 180


def test_a_run_in_a_storm_ends_with_the_weights_and_the_updates_of_one_in_peace(tmp_path: Path, program_cache: Path) -> None:
    plan = small_plan(devices=2, layers=2, rounds=1)
    result = asyncio.run(
        storms(
            tmp_path,
            KILLS,
            seed=3,
            plan=plan,
            mean_bytes=12_000,
            pause_seconds=0.5,
            timeout_seconds=TIMEOUT_SECONDS,
            cache=program_cache,
        )
    )
    assert [found for _, found in result.runs if not found.is_none] == []
    for run, _ in result.runs:
        assert len(run.left.updates) == plan.cohort.size * len(plan.stages)
        assert run.left.weights == result.calm.left.weights and len(run.left.weights) > 3
        assert run.left.told <= {key for key, _ in run.left.updates}
    assert result.killed == (KILLS, KILLS)
    assert {what.partition(" ")[0] for what in result.faults} >= {"cut", "flip"} and result.faults.total() > 10
    assert result.clock_jumps > 0


UPDATE = ((0, 0, "a"), ("c0", 5, 0.5)), ((0, 0, "b"), ("c1", 6, 0.25))
CALM = Left(weights={"head": "w0", "stem": "w1"}, updates=list(UPDATE), told={(0, 0, "a"), (0, 0, "b")}, devices=2)


def test_whatever_differs_is_found() -> None:
    assert difference(CALM, CALM).is_none
    lost = difference(replace(CALM, updates=[UPDATE[0]]), CALM)
    assert lost.lost == [(0, 0, "b")] and not lost.is_none
    assert difference(replace(CALM, updates=[*UPDATE, UPDATE[0]]), CALM).double == [(0, 0, "a")]
    assert difference(replace(CALM, updates=[UPDATE[0], ((0, 0, "b"), ("c1", 7, 0.25))]), CALM).other == [(0, 0, "b")]
    assert difference(replace(CALM, weights={"head": "w0", "stem": "w2"}), CALM).segments == ["stem"]
    assert difference(replace(CALM, devices=3), CALM).devices == 1
    told = replace(CALM, told={*CALM.told, (1, 0, "a")})
    assert difference(told, CALM).lost == [(1, 0, "a")]  # a device was told of an update that nobody has


async def _through(seed: int, mean_bytes: float | None, sent: bytes) -> bytes:
    """What arrives of `sent` at a server that a proxy stands before."""
    arrived = bytearray()
    ended = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1 << 16):
                arrived.extend(piece)
        except OSError:
            pass
        writer.close()
        ended.set()

    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    proxy = Proxy(lambda: listening.sockets[0].getsockname()[1], seed, mean_bytes)
    port = int((await proxy.listen("a")).rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    writer.write_eof()
    await asyncio.wait_for(ended.wait(), 20)
    writer.close()
    await proxy.close()
    listening.close()
    return bytes(arrived)


def test_the_relay_does_what_was_drawn_and_nothing_else() -> None:
    sent = Random(0).randbytes(20_000)
    assert asyncio.run(_through(0, None, sent)) == sent
    kinds = set()
    for seed in range(12):
        arrived = asyncio.run(_through(seed, 15_000, sent))
        expected, place = bytearray(sent), 0
        for fault in draw(Random(f"{seed} a 0 up"), 15_000):
            place += fault.after_bytes
            if place >= len(sent):
                break
            kinds.add(fault.kind)
            if fault.kind == "flip":
                expected[place] ^= 1 << fault.bit
            if fault.kind in ("cut", "truncate"):
                del expected[place:]
                break
        # What a reset overtakes may not arrive; nothing else is missing or other.
        assert arrived == expected or (kinds & {"cut"} and expected.startswith(arrived))
    assert kinds == {"cut", "truncate", "delay", "flip"}


def test_a_seed_gives_the_same_faults_again() -> None:
    assert list(islice(draw(Random("x"), 1000), 50)) == list(islice(draw(Random("x"), 1000), 50))
