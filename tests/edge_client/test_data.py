import numpy as np
import pytest

from edge_client.rows.local_data import LocalData
from edge_client.rows.row_files import RowFile, RowWriter
from lamina.errors import DataError
from lamina.plans.model import Contrastive, Encoder, ModelDescription, Projection, SensorWindows, TextTokens
from tests.edge_client.tiny import CLASSES, MODEL, make_data

GOOD = {
    "train_motion": np.arange(5 * 16, dtype=np.float32).reshape(5, 2, 8),
    "train_label": np.array([0, 1, 2, 0, 1]),
    "test_motion": np.ones((3, 2, 8), np.float32),
    "test_label": np.array([2, 1, 0]),
}
PAIR = ModelDescription(
    name="pair",
    encoders=(
        Encoder(modality="motion", input=SensorWindows(channels=2, samples=8, patch=4), width=4, heads=1, layers=1),
        Encoder(modality="text", input=TextTokens(vocabulary=9, length=4), width=4, heads=1, layers=1),
    ),
    projection=Projection(hidden=4, output=4),
    objective=Contrastive(),
)


def open_data(tmp_path, arrays, save=np.savez):
    save(tmp_path / "data.npz", **arrays)
    return LocalData(tmp_path / "data.npz", tmp_path / "scratch")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_are_read_from_the_file_in_any_order(tmp_path, save):
    data = open_data(tmp_path, GOOD, save)
    data.check(MODEL)
    assert (data.modalities, data.train_examples, data.test_examples) == (("motion",), 5, 3)
    np.testing.assert_array_equal(data.rows("train", "motion").take([4, 0, 4]), GOOD["train_motion"][[4, 0, 4]])
    np.testing.assert_array_equal(data.rows("test", "label").take([2, 1]), [0, 1])
    chunks = [(first, rows.copy()) for first, rows in data.rows("train", "motion").chunks(2)]
    assert [first for first, _ in chunks] == [0, 2, 4]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in chunks]), GOOD["train_motion"])


def test_a_compressed_file_is_unpacked_once_and_the_one_before_it_is_deleted(tmp_path):
    first = open_data(tmp_path, GOOD, np.savez_compressed)
    unpacked = tmp_path / "scratch" / first.fingerprint
    times = {path.name: path.stat().st_mtime_ns for path in unpacked.iterdir()}
    LocalData(tmp_path / "data.npz", tmp_path / "scratch")
    assert {path.name: path.stat().st_mtime_ns for path in unpacked.iterdir()} == times

    second = open_data(tmp_path, GOOD | {"train_label": np.zeros(5, np.int64)}, np.savez_compressed)
    assert second.fingerprint != first.fingerprint
    assert [path.name for path in (tmp_path / "scratch").iterdir() if path.is_dir()] == [second.fingerprint]


def test_the_same_arrays_have_the_same_fingerprint(tmp_path):
    one, two = make_data(tmp_path / "one.npz"), make_data(tmp_path / "two.npz")
    assert LocalData(one, tmp_path / "s").fingerprint == LocalData(two, tmp_path / "s").fingerprint


def test_contrastive_data_needs_no_labels_and_test_data_may_be_absent(tmp_path):
    text = np.full((5, 4), 8)
    data = open_data(tmp_path, {"train_motion": GOOD["train_motion"], "train_text": text})
    data.check(PAIR)
    assert (data.modalities, data.test_examples) == (("motion", "text"), 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_label": np.zeros(4, np.int64)}, "train arrays must have equally many rows"),
        ({"extra": np.zeros(5)}, "array 'extra', which names no split"),
        ({"test_sound": np.zeros((3, 1), np.float32)}, "'test_sound', which names no split or has no train_ counterpart"),
        ({"train_Motion": GOOD["train_motion"]}, "'Motion' is no modality"),
        ({"train_motion": np.array([{}] * 5)}, "array 'train_motion' holds Python objects"),
        ({"train_motion": np.asfortranarray(GOOD["train_motion"])}, "array 'train_motion' is in Fortran order"),
        ({"train_motion": np.array(1.0)}, "array 'train_motion' is a single value"),
        (
            {name: GOOD[name][:0] for name in ("train_motion", "train_label")},
            "no training examples",
        ),
    ],
)
def test_a_file_of_another_form_is_refused_when_it_is_opened(tmp_path, change, words):
    with pytest.raises(DataError, match=words) as caught:
        open_data(tmp_path, GOOD | change)
    assert "data.npz" in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"train_motion": GOOD["train_motion"].astype(np.float64)},
            "'train_motion' has dtype float64, the model takes float32",
        ),
        ({"train_motion": GOOD["train_motion"][:, :, :7].copy()}, r"rows of shape \(2, 7\), the model takes \(2, 8\)"),
        ({"test_label": GOOD["test_label"].astype(np.int32)}, "'test_label' has dtype int32, the model takes int64"),
        ({"train_label": np.array([0, 1, CLASSES, 0, 1])}, r"'train_label': value 3 at index \[2\] is outside of 0..2"),
        ({"test_label": np.array([0, 1, -1])}, r"'test_label': value -1 at index \[2\]"),
    ],
)
def test_values_that_the_model_cannot_take_are_named_with_array_and_index(tmp_path, change, words):
    with pytest.raises(DataError, match=words) as caught:
        open_data(tmp_path, GOOD | change).check(MODEL)
    assert "data.npz" in caught.value.message


def test_nan_and_infinity_are_found_wherever_they_are(tmp_path):
    motion = np.zeros((20000, 2, 8), np.float32)  # more than one chunk of the check
    motion[19999, 1, 3] = np.inf
    arrays = {"train_motion": motion, "train_label": np.zeros(20000, np.int64)}
    with pytest.raises(DataError, match=r"'train_motion': value inf at index \[19999, 1, 3\] is not finite"):
        open_data(tmp_path, arrays).check(MODEL)


def test_a_token_outside_of_the_vocabulary_is_found(tmp_path):
    text = np.zeros((5, 4), np.int64)
    text[3, 1] = 9
    with pytest.raises(DataError, match=r"'train_text': value 9 at index \[3, 1\] is outside of 0..8"):
        open_data(tmp_path, {"train_motion": GOOD["train_motion"], "train_text": text}).check(PAIR)


def test_a_modality_that_the_model_needs_is_missed_by_name(tmp_path):
    with pytest.raises(DataError, match="has no array train_text"):
        open_data(tmp_path, GOOD).check(PAIR)


def test_labels_that_the_model_needs_are_missed_by_name(tmp_path):
    with pytest.raises(DataError, match="has no array train_label"):
        open_data(tmp_path, {"train_motion": GOOD["train_motion"]}).check(MODEL)


def test_a_file_that_is_missing_or_no_npz_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        LocalData(tmp_path / "none.npz", tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"is no \.npz file"):
        LocalData(tmp_path / "text.npz", tmp_path)


def test_a_file_cut_short_under_the_reader_is_noticed(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((10, 100)))
    rows = RowFile(tmp_path / "a.npy")
    with (tmp_path / "a.npy").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="was changed while it was in use"):
        rows.take([9])
    with pytest.raises(DataError, match="is cut off"):
        RowFile(tmp_path / "a.npy")


def test_written_rows_are_a_plain_npy_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(np.float32)
    writer = RowWriter(tmp_path / "w.npy", 7)
    writer.append(rows[:4])
    writer.append(rows[4:])
    writer.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), rows)
