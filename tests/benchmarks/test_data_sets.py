"""The data sets of the benchmarks: what their readers accept and refuse, and the real ones where the cache has them."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.data import emoji_images, fashion, seglearn
from benchmarks.data.fetch import cache_folder
from benchmarks.data.partition import dirichlet_rows, natural_rows
from benchmarks.methods.data_sets import DATA_SETS
from lamina.errors import ConfigError, DataError


def needs(cached: str, package: str) -> pytest.MarkDecorator:
    """Skips where the prepared file is not in the cache: tests need no network."""
    is_there = (cache_folder() / "data" / cached).exists()
    return pytest.mark.skipif(not is_there, reason=f"{cached} of the package {package} is not in {cache_folder() / 'data'}")


# seglearn


def recordings(lengths: tuple[int, ...] = (100, 149, 250)) -> dict[str, object]:
    made = np.empty(len(lengths), object)
    for number, length in enumerate(lengths):
        made[number] = np.arange(length * 6, dtype=np.float64).reshape(length, 6)
    return {"X": made, "y": np.arange(len(lengths)), "subject": np.arange(len(lengths)) + 1}


def as_npy(value: object) -> bytes:
    file = io.BytesIO()
    wrapped = np.empty((), object)
    wrapped[()] = value
    np.save(file, wrapped)
    # As numpy 1 wrote it, which is how the file of the package was made.
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def test_a_pickled_dictionary_of_arrays_is_read_without_numpy_unpickling_it() -> None:
    found = seglearn.read_object_array(as_protocol_2(recordings()))
    assert set(found) == {"X", "y", "subject"}
    np.testing.assert_array_equal(found["X"][1], recordings()["X"][1])


def as_protocol_2(value: object) -> bytes:
    """An object array in a .npy file, pickled as Python 2 understands it."""
    wrapped = np.empty((), object)
    wrapped[()] = value
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    text = pickle.dumps(wrapped, protocol=2)
    return file.getvalue() + text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_anything_but_arrays_is_refused_by_name(protocol: int) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    with pytest.raises(DataError, match="eval, which is not allowed"):
        seglearn.read_object_array(file.getvalue() + pickle.dumps(Harmful(), protocol=protocol))


@pytest.mark.parametrize("data", [b"", b"no array", as_npy({"a": 1})[:-3]])
def test_a_file_that_is_no_whole_array_of_one_object_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"watch_dataset\.npy"):
        seglearn.read_object_array(data)
    plain = io.BytesIO()
    np.save(plain, np.zeros(3))
    with pytest.raises(DataError, match="shape"):
        seglearn.read_object_array(plain.getvalue())


def test_windows_of_100_samples_start_every_50_and_never_cross_two_recordings() -> None:
    windows = seglearn.cut_windows(recordings((99, 100, 149, 250)))
    assert windows.accelerometer.shape == windows.gyroscope.shape == (1 + 1 + 4, 3, 100)
    np.testing.assert_array_equal(windows.label, [1, 2, 3, 3, 3, 3])
    np.testing.assert_array_equal(windows.subject, [2, 3, 4, 4, 4, 4])
    np.testing.assert_array_equal(windows.accelerometer[3][:, 0], [50 * 6, 50 * 6 + 1, 50 * 6 + 2])
    np.testing.assert_array_equal(windows.gyroscope[3][:, 0], [50 * 6 + 3, 50 * 6 + 4, 50 * 6 + 5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"X": []}, "lacks"),
        ({"X": [np.zeros((200, 5))], "y": [0], "subject": [1]}, "shape"),
        (recordings((5,)), "at least 100"),
    ],
)
def test_recordings_of_another_form_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        seglearn.cut_windows(wrong)


def test_a_split_by_subject_shares_no_subject_and_is_scaled_by_the_training_part_alone() -> None:
    windows = seglearn.cut_windows(recordings((300, 400, 500)))
    train, test = seglearn.split_by_subject(windows, [2])
    assert set(train.subject) == {1, 3} and set(test.subject) == {2}
    np.testing.assert_allclose(train.gyroscope.mean(axis=(0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(train.gyroscope.std(axis=(0, 2)), 1, atol=1e-5)
    assert abs(test.gyroscope.mean()) > 1e-3
    assert [set(train.subject[rows]) for rows in natural_rows(train.subject)] == [{1}, {3}]
    for wrong in ([], [1, 2, 3], [9]):
        with pytest.raises(ConfigError, match="test_subjects"):
            seglearn.split_by_subject(windows, wrong)


@needs("seglearn-watch-v1-1.2.5.npz", "seglearn")
def test_the_watch_data_has_the_windows_that_its_docstring_names() -> None:
    windows = seglearn.load_seglearn()
    assert windows.accelerometer.shape == windows.gyroscope.shape == (4677, 3, 100)
    assert windows.accelerometer.dtype == np.float32
    np.testing.assert_array_equal(np.bincount(windows.label), [502, 770, 780, 718, 723, 583, 601])
    counts = np.bincount(windows.subject)[1:]
    assert len(counts) == 10 and (counts.min(), counts.max()) == (295, 561)


@needs("seglearn-watch-v1-1.2.5.npz", "seglearn")
def test_public_subjects_are_neither_clients_nor_the_test() -> None:
    everybody = seglearn.load_seglearn()
    six, public = (DATA_SETS[name].load(3) for name in ("seglearn_six", "seglearn_pretrained"))
    assert six.public is None and public.public is not None
    assert public.owner is not None and len(np.unique(public.owner)) == 6
    counts = [len(each["label"]) for each in (public.train, public.test, public.public)]
    assert sum(counts) == len(everybody.label) and len(public.owner) == counts[0]
    np.testing.assert_array_equal(six.train["gyroscope"], public.train["gyroscope"])


# Fashion-MNIST


def idx(values: np.ndarray) -> bytes:
    magic = 2051 if values.ndim == 3 else 2049
    return np.array([magic, *values.shape], ">u4").tobytes() + values.astype(np.uint8).tobytes()


def debian_package(path: Path, members: dict[str, bytes]) -> Path:
    """An ar archive of a control part of odd length and a data part with these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    made = b"!<arch>\n"
    for name, part in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
        made += f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
    path.write_bytes(made)
    return path


def test_a_file_is_read_out_of_a_debian_package_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    package = debian_package(tmp_path / "a.deb", {"usr/share/x": b"content"})
    assert fashion.read_debian_member(package, "usr/share/x") == b"content"
    with pytest.raises(DataError, match="has no file usr/share/y"):
        fashion.read_debian_member(package, "usr/share/y")
    (tmp_path / "b.deb").write_bytes(b"something else")
    with pytest.raises(DataError, match="no Debian package"):
        fashion.read_debian_member(tmp_path / "b.deb", "usr/share/x")


def test_idx_files_are_images_or_labels_of_the_promised_length() -> None:
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    np.testing.assert_array_equal(fashion.parse_idx(idx(images)), images)
    np.testing.assert_array_equal(fashion.parse_idx(idx(np.array([3, 9]))), [3, 9])
    for wrong, message in ((idx(images)[:-1], "bytes"), (b"\0\0\x08\x02" + bytes(8), "begins with"), (b"", "begins with")):
        with pytest.raises(DataError, match=message):
            fashion.parse_idx(wrong)


@pytest.fixture
def tiny_fashion(monkeypatch, tmp_path: Path) -> None:
    """Four images of each class for training and two for test; the grey of each tells its class and its number."""
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    members = {}
    for prefix, each in (("train", 4), ("t10k", 2)):
        label = np.repeat(np.arange(10), each)
        grey = label * 20 + np.tile(np.arange(each), 10)
        members[f"{prefix}-images-idx3"] = np.broadcast_to(grey[:, None, None], (10 * each, 28, 28))
        members[f"{prefix}-labels-idx1"] = label
    files = {f"{fashion._FOLDER}/{name}-ubyte.gz": gzip.compress(idx(values)) for name, values in members.items()}
    (tmp_path / "data").mkdir()
    made = debian_package(tmp_path / "made.deb", files)
    monkeypatch.setattr(fashion, "fetch_debian", lambda *_: made)


def greys(images: fashion.Images) -> NDArray[np.int64]:
    return np.rint(images.image[:, 0, 0, 0] * 255).astype(int)


def test_fashion_gives_equally_many_of_each_class_the_same_for_the_same_seed(tiny_fashion: None) -> None:
    train, test = fashion.load_fashion(1, 20, 10)
    assert train.image.shape == (20, 1, 28, 28) and test.image.shape == (10, 1, 28, 28)
    np.testing.assert_array_equal(np.bincount(train.label), [2] * 10)
    np.testing.assert_array_equal(greys(train) // 20, train.label)
    np.testing.assert_array_equal(train.label, fashion.load_fashion(1, 20, 10)[0].label)
    assert not np.array_equal(train.label, fashion.load_fashion(2, 20, 10)[0].label)
    for wrong in (15, 50, 0):
        with pytest.raises(ConfigError, match="multiple of 10, at most 40"):
            fashion.load_fashion(1, wrong, 10)


def test_fashion_held_out_are_training_images_that_were_not_drawn(tiny_fashion: None) -> None:
    train, held_out = fashion.load_fashion(1, 20, 10)[0], fashion.load_held_out(1, 20, 10)
    np.testing.assert_array_equal(np.bincount(held_out.label), [1] * 10)
    np.testing.assert_array_equal(greys(held_out) // 20, held_out.label)
    assert not set(greys(train)) & set(greys(held_out))
    with pytest.raises(ConfigError, match="multiple of 10, at most the 20 that are left, given 30"):
        fashion.load_held_out(1, 20, 30)


def test_without_apt_the_error_says_where_to_put_the_package(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"dataset-fashion-mnist.* put the package's \.deb"):
        fashion.fetch_debian(*fashion.PACKAGE, tmp_path)


@needs("fashion-mnist-v1-20200523.npz", "dataset-fashion-mnist")
def test_the_real_fashion_data_is_balanced_and_scaled() -> None:
    train, test = fashion.load_fashion(0, 1000, 500)
    assert 0.25 < train.image.mean() < 0.32 and train.image.max() == 1.0
    assert np.bincount(train.label).tolist() == [100] * 10 and np.bincount(test.label).tolist() == [50] * 10


# Emoji-4Style

ENTRIES = [
    {"label": "red heart", "tags": ["love", "heart"], "hexcode": "2764-FE0F", "group": 8},
    {"label": "cat face", "tags": ["animal"], "hexcode": "1F431", "group": 3},
    {"label": "light skin tone", "hexcode": "1F3FB", "group": 2},
    {"label": "regional indicator A", "hexcode": "1F1E6"},
]


def test_concepts_are_entries_of_a_group_without_components() -> None:
    heart, cat = emoji_images.read_concepts(ENTRIES)
    assert (heart.code, heart.caption) == ("2764", "red heart love heart")
    assert (cat.code, cat.group) == ("1f431", 3)


def test_icons_are_found_by_code_points_and_mirrors_are_left_out() -> None:
    icons = {"width": 128, "height": 64, "icons": {"heart": {"body": "<g/>"}, "cat": {"body": "<b/>", "width": 32}}}
    found = emoji_images.find_icons(icons, {"2764": "heart", "1f431-FE0F": "cat", "1f600": "only-an-alias"})
    assert set(found) == {"2764", "1f431"}
    assert 'viewBox="0 0 128 64"' in found["2764"] and 'viewBox="0 0 32 64"><b/>' in found["1f431"]


def test_a_picture_that_is_not_square_stands_on_white() -> None:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (32, 16), (0, 0, 0)).save(file, "PNG")
    pixels = emoji_images.to_pixels(file.getvalue())
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8
    assert (pixels[:, :8] == 255).all() and (pixels[:, 8:24] == 0).all() and (pixels[:, 24:] == 255).all()


def make_pairs(families: int = 12, concepts: int = 5) -> emoji_images.Pairs:
    """Two styles of each concept."""
    concept = np.repeat(np.arange(families * concepts), 2)
    return emoji_images.Pairs(
        np.zeros((len(concept), 3, 32, 32), np.float32),
        tuple(f"concept {each}" for each in concept),
        np.tile([0, 1], families * concepts),
        concept,
        concept // concepts,
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_family_is_on_both_sides_of_a_split(seed: int) -> None:
    pairs = make_pairs()
    train, test = emoji_images.split_by_family(pairs, seed, 0.25)
    assert not set(train.family) & set(test.family) and not set(train.concept) & set(test.concept)
    assert len(train.style) + len(test.style) == len(pairs.style)
    assert 0.2 <= len(test.style) / len(pairs.style) <= 0.3
    np.testing.assert_array_equal(test.concept, emoji_images.split_by_family(pairs, seed, 0.25)[1].concept)


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        emoji_images.split_by_family(make_pairs(), 0, 1.0)


def test_words_get_ids_by_how_many_training_captions_have_them() -> None:
    captions = ["Red heart, heart", "red_cat", "red heart, heart!", "dog"]
    vocabulary = emoji_images.make_vocabulary(captions, size=6)
    assert vocabulary == {"red": 2, "heart": 3, "cat": 4, "dog": 5}
    assert emoji_images.make_vocabulary(captions, size=4) == {"red": 2, "heart": 3}
    ids = emoji_images.tokenise(["a red cat is red", "", "DOG"], vocabulary, 4)
    np.testing.assert_array_equal(ids, [[1, 2, 4, 1], [0, 0, 0, 0], [5, 0, 0, 0]])
    assert ids.dtype == np.int64


@given(
    st.lists(st.text(max_size=20), max_size=6), st.lists(st.text(max_size=20), max_size=6), st.integers(1, 9), st.integers(2, 9)
)
def test_any_caption_has_ids_that_the_vocabulary_bounds(known: list[str], others: list[str], length: int, size: int) -> None:
    vocabulary = emoji_images.make_vocabulary(known, size)
    assert sorted(vocabulary.values()) == list(range(2, 2 + len(vocabulary))) and len(vocabulary) <= size - 2
    ids = emoji_images.tokenise([*known, *others], vocabulary, length)
    assert ids.shape == (len(known) + len(others), length) and (ids >= 0).all() and (ids < size).all()
    padded = ids == 0
    assert (padded[:, 1:] >= padded[:, :-1]).all()  # padding is at the end


@needs("emoji-4style-v1-32.npz", "emojibase-data, @iconify-json/* and resvg-py")
def test_the_rendered_emoji_are_those_that_the_docstring_counts() -> None:
    pairs = emoji_images.load_emoji_images(with_flags=True)
    assert np.bincount(pairs.style).tolist() == [1652, 1914, 1594, 1914]
    assert len(np.unique(pairs.concept)) == 1914 and len(np.unique(pairs.family)) == 1758
    assert pairs.image.shape == (7074, 3, 32, 32) and 0 <= pairs.image.min() < pairs.image.max() <= 1
    assert (pairs.image.std(axis=(1, 2, 3)) > 0.005).all()  # nothing is drawn empty; a white square is nearly so
    without = emoji_images.load_emoji_images()
    assert len(np.unique(without.concept)) == 1914 - 270


# Partitions


def test_natural_rows_are_a_client_for_each_value() -> None:
    rows = natural_rows(np.array([3, 1, 3, 2]))
    assert [part.tolist() for part in rows] == [[1], [3], [0, 2]]


def test_dirichlet_rows_give_every_row_to_one_device() -> None:
    label = np.repeat(np.arange(5), 40)
    parts = dirichlet_rows(label, 4, 0.5, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
