"""The feature cache over real programs (ONNX Runtime), with an engine that counts its runs."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from edge_client.checks import limits_of
from edge_client.data import LocalData
from edge_client.engines import load_engine
from edge_client.feature_cache import FeatureCache, FrozenStep
from edge_client.rows import RowFile
from lamina.errors import DataError, NonFiniteError
from lamina.manifest import Program
from lamina.segments import Segment, TensorSpec
from lamina.tensors import encode, hash_bytes
from tests.edge_client.tiny import LAYERS, MAX_BATCH, MODEL, SEGMENTS, initial_weights, make_data, make_segment, run_segments

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

    def __init__(self, folder, programs, seed=0):
        self.folder, self.fetched = folder, []
        path = folder / "data.npz"
        self.data = LocalData(path if path.exists() else make_data(path, train=EXAMPLES), folder / "scratch")
        self.engine = CountingEngine(load_engine("onnxruntime"))
        self.weights = initial_weights(seed)
        self.chain, self.blobs = [], {}
        for name in CHAIN:
            program = programs.program("onnxruntime", "frozen", [name])
            data = encode(self.weights[name])
            self.blobs |= {hash_bytes(data): data, program.blob: programs.blobs[program.blob]}
            self.chain.append(FrozenStep(make_segment(name), hash_bytes(data), program))
        self.said = []
        self.restart()

    def restart(self):
        self.cache = FeatureCache(self.folder / "features", self.data.fingerprint, self.engine, self.fetch, self.said.append)

    def fetch(self, digest):
        self.fetched.append(digest)
        path = self.folder / digest
        path.write_bytes(self.blobs[digest])
        return path

    def features(self, depth, on_chunk=lambda: None):
        self.engine.runs.clear()
        self.fetched.clear()
        source = self.data.rows("train", "motion")
        rows = self.cache.rows("motion", "train", source, self.chain[:depth], limits_of(MODEL), on_chunk)
        return rows.take(range(len(rows)))

    def eager(self, depth):
        weights = [torch.from_numpy(value) for name in CHAIN[:depth] for value in self.weights[name].values()]
        x = torch.from_numpy(self.data.rows("train", "motion").take(range(EXAMPLES)))
        return run_segments(CHAIN[:depth], weights, x)[0].numpy()

    def files(self):
        return sorted(path.name for path in (self.folder / "features").iterdir())


@pytest.fixture
def house(tmp_path, programs):
    return House(tmp_path, programs)


@pytest.mark.parametrize("depth", [1, 2, LAYERS + 1])
def test_cached_features_are_what_the_prefix_computes(house, depth):
    np.testing.assert_allclose(house.features(depth), house.eager(depth), atol=1e-5)


def test_the_second_request_runs_and_fetches_nothing_even_after_a_restart(house):
    first = house.features(2)
    for _ in range(2):
        np.testing.assert_array_equal(house.features(2), first)
        assert (house.engine.runs, house.fetched) == ([], [])
        house.restart()


def test_a_longer_prefix_runs_only_the_new_segments(house):
    house.features(1)
    extended = house.features(3)
    assert len(house.engine.runs) == 2 * CHUNKS
    assert house.fetched == [blob for step in house.chain[1:3] for blob in (step.weights, step.program.blob)]
    np.testing.assert_allclose(extended, house.eager(3), atol=1e-5)


def test_an_empty_prefix_is_the_data_itself(house):
    np.testing.assert_array_equal(house.features(0), house.data.rows("train", "motion").take(range(EXAMPLES)))
    assert house.files() == []


def test_only_the_deepest_features_are_kept(house):
    house.features(3)
    (house.folder / "features" / "left-behind.partial").write_bytes(b"x")
    assert len(house.files()) == 4
    house.cache.keep_only([("motion", "train", house.chain[:3])])
    assert len(house.files()) == 1
    house.features(3)
    assert house.engine.runs == []


def test_features_of_the_last_stage_are_kept_until_the_next_stage_has_its_own(house):
    house.features(2)
    house.cache.keep_only([("motion", "train", house.chain[:3]), ("motion", "test", house.chain[:3])])
    house.features(3)
    assert len(house.engine.runs) == CHUNKS


def test_other_weights_make_other_features(house):
    house.features(1)
    data = encode(initial_weights(seed=9)[CHAIN[0]])
    house.blobs[hash_bytes(data)] = data
    house.weights[CHAIN[0]] = initial_weights(seed=9)[CHAIN[0]]
    house.chain[0] = FrozenStep(make_segment(CHAIN[0]), hash_bytes(data), house.chain[0].program)
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
    data = encode({name: np.full_like(value, 3e38) for name, value in house.weights[CHAIN[0]].items()})
    house.blobs[hash_bytes(data)] = data
    house.chain[0] = FrozenStep(make_segment(CHAIN[0]), hash_bytes(data), house.chain[0].program)
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
    house.cache.keep_only([("motion", "train", house.chain[:3])])
    assert len(house.files()) == 1


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

    segment = Segment(name="text.stem", modality="text", tensors=(TensorSpec(name="table", shape=(5, 4)),))
    program = Program(
        engine="torch",
        role="frozen",
        blob="0" * 64,
        weights=((5, 4),),
        inputs=(TensorSpec(name="x", shape=(3,), dtype="int64"),),
        max_batch=4,
        activation_bytes=0,
    )
    (tmp_path / "weights").write_bytes(encode({"table": np.zeros((5, 4), np.float32)}))
    np.save(tmp_path / "tokens.npy", np.array([[0, 1, 5]]))
    cache = FeatureCache(tmp_path / "features", "f", Engine(), lambda digest: tmp_path / digest, print)
    step = FrozenStep(segment, "weights", program)
    with pytest.raises(DataError, match=r"value 5 at index \[0, 2\] is outside of 0..4"):
        cache.rows("text", "train", RowFile(tmp_path / "tokens.npy"), [step], {"text": 5, "label": 3})
