"""The feature cache over real programs (ONNX Runtime), with an engine that counts its runs."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.engines import load_engine
from edge_client.job import Augmentation, FeaturePlan, FrozenStep, ProgramFile, SegmentFile, Tensor
from edge_client.rows.augment import AugmentedRows
from edge_client.rows.feature_cache import VERIFIED, FeatureCache, FeaturesLostError
from edge_client.rows.feature_encoding import decode_rows, encode_rows, row_dtype
from edge_client.rows.local_data import LocalData
from edge_client.rows.row_files import RowFile
from lamina.encoding.tensors import encode, hash_bytes
from lamina.errors import DataError, DiskFullError, NonFiniteError
from tests.edge_client.tiny import (
    LAYERS,
    MAX_BATCH,
    SAMPLES,
    SEGMENTS,
    TOKENS,
    WIDTH,
    initial_weights,
    make_data,
    rows_of,
    run_segments,
    segment_file,
)

CHAIN = SEGMENTS[: LAYERS + 1]
EXAMPLES = 21
CHUNKS = -(-EXAMPLES // MAX_BATCH)


class CountingEngine:
    """An engine that notes each program run, and how many programs are open at a time."""

    def __init__(self, engine):
        self._engine, self.name, self.runs, self.open = engine, engine.name, [], 0

    def load(self, path, program):
        self.open += 1
        assert self.open == 1, "two frozen programs are in memory"
        return CountingProgram(self, self._engine.load(path, program), path.name)


class CountingProgram:
    def __init__(self, engine, program, name):
        self._engine, self._program, self._name = engine, program, name

    def run(self, arrays):
        self._engine.runs.append(self._name)
        return self._program.run(arrays)

    def close(self):
        self._engine.open -= 1
        self._program.close()


class House:
    """A cache with its blobs in a folder."""

    def __init__(self, folder, programs, seed=0, encoding="fp32", augmentation=None, views=1, stored=EXAMPLES):
        self.folder, self.encoding, self.augmentation, self.views, self.stored = folder, encoding, augmentation, views, stored
        path = folder / "data.npz"
        self.data = LocalData(path if path.exists() else make_data(path, train=EXAMPLES), folder / "scratch")
        self.engine = CountingEngine(load_engine("onnxruntime"))
        self.chain = [programs.file(programs.program("onnxruntime", "frozen", [name])) for name in CHAIN]
        self.set_weights(initial_weights(seed))
        self.said = []
        self.restart()

    def set_weights(self, weights, names=CHAIN):
        self.weights = getattr(self, "weights", {}) | {name: weights[name] for name in names}
        for name in names:
            (self.folder / name).write_bytes(encode(weights[name]))

    def restart(self):
        self.cache = FeatureCache(self.folder / "features", self.engine, self.encoding, self.said.append)

    def plan(self, depth):
        steps = tuple(
            FrozenStep(segment_file(name, self.folder / name), program)
            for name, program in zip(CHAIN[:depth], self.chain, strict=False)
        )
        # What prepare.py puts into a key: data, weights, encoding, view.
        facts = [(self.folder / name).read_bytes() for name in CHAIN[:depth]]
        keys = tuple(
            tuple(
                hash_bytes(b"".join([self.data.fingerprint.encode(), bytes([view]), *facts[: done + 1]]))[:40]
                for done in range(depth)
            )
            for view in range(self.views)
        )
        rows = rows_of(self.data.rows("train", "motion"))
        return FeaturePlan("motion", rows, steps, keys, self.augmentation)

    def features(self, depth, on_chunk=lambda: None, view=0, indices=range(EXAMPLES)):
        self.engine.runs.clear()
        rows = self.cache.rows(self.plan(depth), view, self.stored, on_chunk)
        assert len(rows) == EXAMPLES
        return rows.take(indices)

    def keep_only(self, depth):
        self.cache.keep_only(self.plan(depth).keys)

    def eager(self, depth, rows=None):
        weights = [torch.from_numpy(value) for name in CHAIN[:depth] for value in self.weights[name].values()]
        x = torch.from_numpy(self.data.rows("train", "motion").take(range(EXAMPLES)) if rows is None else rows)
        return run_segments(CHAIN[:depth], weights, x)[0].numpy()

    def files(self):
        return sorted(path.name for path in (self.folder / "features").iterdir() if path.name != VERIFIED)


@pytest.fixture
def house(tmp_path, programs):
    return House(tmp_path, programs)


@pytest.mark.parametrize("depth", [1, 2, LAYERS + 1])
def test_cached_features_are_what_the_prefix_computes(house, depth):
    np.testing.assert_allclose(house.features(depth), house.eager(depth), atol=1e-5)


def test_the_second_request_runs_nothing_even_after_a_restart(house):
    first = house.features(2)
    for _ in range(2):
        np.testing.assert_array_equal(house.features(2), first)
        assert house.engine.runs == []
        house.restart()


def test_a_longer_prefix_runs_only_the_new_segments(house):
    house.features(1)
    extended = house.features(3)
    assert len(house.engine.runs) == 2 * CHUNKS
    np.testing.assert_allclose(extended, house.eager(3), atol=1e-5)


def test_an_empty_prefix_is_the_data_itself(house):
    np.testing.assert_array_equal(house.features(0), house.data.rows("train", "motion").take(range(EXAMPLES)))
    assert house.files() == []


def test_only_the_deepest_features_are_kept(house):
    house.features(3)
    (house.folder / "features" / "left-behind.partial").write_bytes(b"x")
    assert len(house.files()) == 4
    house.keep_only(3)
    assert len(house.files()) == 1
    house.features(3)
    assert house.engine.runs == []


def test_features_of_the_last_stage_are_kept_until_the_next_stage_has_its_own(house):
    house.features(2)
    house.keep_only(3)
    house.features(3)
    assert len(house.engine.runs) == CHUNKS


def test_other_weights_make_other_features(house):
    house.features(1)
    house.set_weights(initial_weights(seed=9), CHAIN[:1])
    np.testing.assert_allclose(house.features(1), house.eager(1), atol=1e-5)
    assert len(house.engine.runs) == CHUNKS


def test_other_data_makes_other_features(house):
    house.features(1)
    house.data = LocalData(make_data(house.folder / "other.npz", train=EXAMPLES, seed=5), house.folder / "scratch")
    house.restart()
    np.testing.assert_allclose(house.features(1), house.eager(1), atol=1e-5)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_made_again_from_the_one_before_it(house, damage):
    expected = house.features(2)
    before = set(house.files())
    house.features(1)
    (deepest,) = [name for name in before if np.array_equal(np.load(house.folder / "features" / name), expected)]
    path = house.folder / "features" / deepest
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-5]), "empty": b""}[damage])

    house.restart()
    np.testing.assert_array_equal(house.features(2), expected)
    assert len(house.engine.runs) == CHUNKS
    assert any("damaged" in line for line in house.said)


def test_an_interruption_leaves_nothing_that_could_be_taken_for_features(house):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        house.features(1, on_chunk=stop)
    assert house.files() == []
    assert house.engine.open == 0


def test_features_that_are_not_finite_are_refused(house):
    huge = {name: np.full_like(value, 3e38) for name, value in house.weights[CHAIN[0]].items()}
    house.set_weights({CHAIN[0]: huge}, CHAIN[:1])
    with pytest.raises(NonFiniteError, match=r"features of motion.stem: value .* at index"):
        house.features(1)
    assert house.files() == []


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from tests.edge_client.test_feature_cache import House, CHUNKS
from tests.edge_client.tiny import TinyPrograms

programs = TinyPrograms(Path(sys.argv[2]))
programs.blobs, programs.made = pickle.loads(Path(sys.argv[3]).read_bytes())
house = House(Path(sys.argv[1]), programs)
count = 0
def die_in_the_middle_of_the_second_segment():
    global count
    count += 1
    if count == CHUNKS + 2:
        os.kill(os.getpid(), signal.SIGKILL)
house.features(3, die_in_the_middle_of_the_second_segment)
"""


def test_a_device_killed_in_the_middle_goes_on_from_the_last_whole_segment(house, programs, tmp_path):
    known = tmp_path / "known"
    known.write_bytes(pickle.dumps((programs.blobs, programs.made)))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(programs.folder), str(known)])
    assert killed.returncode == -9
    assert sorted(name.rpartition(".")[2] for name in house.files()) == ["npy", "partial"]

    np.testing.assert_allclose(house.features(3), house.eager(3), atol=1e-5)
    assert len(house.engine.runs) == 2 * CHUNKS  # the first segment was whole
    house.keep_only(3)
    assert len(house.files()) == 1


def test_features_that_the_job_counted_on_and_are_damaged_ask_for_another_job(house):
    house.features(1)
    plan = house.plan(1)
    without_files = [
        FrozenStep(replace(step.segment, path=""), replace(step.program, path=""), step.limit) for step in plan.steps
    ]
    (path,) = (house.folder / "features").glob("*.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    house.restart()
    with pytest.raises(FeaturesLostError):
        house.cache.rows(replace(plan, steps=tuple(without_files)), 0, EXAMPLES)
    assert house.files() == []


@pytest.mark.parametrize(("encoding", "bound"), [("fp16", 2**-11), ("int8", 0.5 / 127)])
def test_smaller_encodings_are_off_by_no_more_than_they_promise(tmp_path, programs, encoding, bound):
    house = House(tmp_path, programs, encoding=encoding)
    exact, given = house.eager(1), house.features(1)
    largest = np.abs(exact).max(axis=-1, keepdims=True)  # of each token
    assert given.dtype == np.float32
    assert (np.abs(given - exact) <= bound * largest + 1e-6).all()
    assert not np.array_equal(given, exact)
    (path,) = (tmp_path / "features").glob("*.npy")
    header = path.stat().st_size - EXAMPLES * row_dtype((TOKENS, WIDTH), encoding).itemsize
    assert header in (128, 192)


def test_an_extension_over_small_encodings_starts_from_what_is_stored(tmp_path, programs):
    house = House(tmp_path, programs, encoding="int8")
    house.features(1)
    given = house.features(2)
    assert len(house.engine.runs) == CHUNKS
    assert np.abs(given - house.eager(2)).max() < 0.01 * np.abs(house.eager(2)).max()


def test_a_feature_beyond_fp16_is_refused_and_not_turned_into_infinity():
    with pytest.raises(NonFiniteError, match="70000 does not fit fp16"):
        encode_rows(np.full((1, 2, 2), 7e4, np.float32), "fp16", 0, "features")


def test_rows_of_zeros_are_stored_as_zeros():
    zeros = np.zeros((2, 3, 4), np.float32)
    for encoding in ("fp32", "fp16", "int8"):
        np.testing.assert_array_equal(decode_rows(encode_rows(zeros, encoding, 0, "features")), zeros)


@pytest.mark.parametrize("stored", [0, 1, 13, EXAMPLES])
def test_what_does_not_fit_the_disk_is_computed_to_the_same_values(tmp_path, programs, stored):
    house = House(tmp_path, programs, stored=stored)
    order = np.random.default_rng(0).permutation(EXAMPLES)
    np.testing.assert_allclose(house.features(3, indices=order), house.eager(3)[order], atol=1e-5)
    assert house.engine.open <= 1
    house.keep_only(3)
    sizes = [path.stat().st_size for path in (tmp_path / "features").glob("*.npy")]
    assert sizes == ([128 + stored * TOKENS * WIDTH * 4] if stored else [])


def test_each_view_is_its_own_version_and_stays_the_same(tmp_path, programs):
    augmentation = Augmentation(axes=(-1,), shift=2, noise=0.1, flip=False, seed=3)
    house = House(tmp_path, programs, augmentation=augmentation, views=2)
    first, second = house.features(1, view=0), house.features(1, view=1)
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(house.features(1, view=0), first)
    assert house.engine.runs == []
    raw = AugmentedRows(house.data.rows("train", "motion"), augmentation, 1).take(range(EXAMPLES))
    np.testing.assert_allclose(second, house.eager(1, raw), atol=1e-5)
    assert len(house.files()) == 2


def test_an_augmented_example_does_not_depend_on_who_is_beside_it(house):
    rows = AugmentedRows(house.data.rows("train", "motion"), Augmentation((-1,), 2, 0.1, True, 3), 0)
    np.testing.assert_array_equal(rows.take([5, 2, 9])[1], rows.take([2])[0])


def test_a_shift_moves_zeros_in(house):
    rows = AugmentedRows(house.data.rows("train", "motion"), Augmentation((-1,), 3, 0.0, False, 0), 0)
    plain = house.data.rows("train", "motion").take(range(EXAMPLES))
    moved = rows.take(range(EXAMPLES))
    for before, after in zip(plain, moved, strict=True):
        padded = np.pad(before, ((0, 0), (3, 3)))
        assert any(np.array_equal(padded[:, start : start + SAMPLES], after) for start in range(7))
    assert not np.array_equal(plain, moved)


def test_a_full_disk_leaves_no_half_of_a_file_and_says_what_to_do(house, monkeypatch):
    house.features(1)
    whole = house.files()
    with Path("/dev/full").open("wb", buffering=0) as none:
        monkeypatch.setattr("edge_client.rows.row_files.RowWriter._open", lambda self: none, raising=True)
        with pytest.raises(DiskFullError, match="no space left"):
            house.features(2)
    assert house.files() == whole
    monkeypatch.undo()
    np.testing.assert_allclose(house.features(2), house.eager(2), atol=1e-5)


def test_tokens_of_a_frozen_text_stem_are_held_to_the_vocabulary_of_its_modality(tmp_path):
    """An embedding reads out of bounds without a word, so the check must find the limit although the input is named x."""

    class NeverRun:
        def run(self, arrays):
            raise AssertionError("the program saw an illegal token")

        def close(self):
            pass

    class Engine:
        def load(self, path, program):
            return NeverRun()

    (tmp_path / "weights").write_bytes(encode({"table": np.zeros((5, 4), np.float32)}))
    np.save(tmp_path / "tokens.npy", np.array([[0, 1, 5]]))
    segment = SegmentFile("text.stem", str(tmp_path / "weights"), (Tensor("table", (5, 4)),))
    program = ProgramFile("p", "0" * 64, "frozen", ((5, 4),), (Tensor("x", (3,), "int64"),), 4)
    plan = FeaturePlan("text", rows_of(RowFile(tmp_path / "tokens.npy")), (FrozenStep(segment, program, 5),), (("key",),))
    cache = FeatureCache(tmp_path / "features", Engine(), "fp32", print)
    with pytest.raises(DataError, match=r"value 5 at index \[0, 2\] is outside of 0..4"):
        cache.rows(plan, 0, 1)
