"""Each kind of source becomes a file that a device opens, checks and reads."""

import numpy as np
import pytest
from PIL import Image as Pillow

from lamina.data.convert import Settings
from lamina.data.pack import Options, check, classes_path, pack
from lamina.data.sources import SourceSettings, find_kind
from lamina.data.text import open_tokenizer
from lamina.errors import DataError
from tests.lamina.trees import (
    GREY,
    MOTION,
    PICTURE,
    SOUND,
    TEXT,
    WAVEFORM,
    advance_tree,
    coco_tree,
    make_model,
    opened,
    photo_folder,
    values,
    write_image,
    write_sound,
    write_table,
)

ALL_TRAIN = Options(test_share=None)


def test_a_folder_of_images_with_a_table(tmp_path):
    model = make_model(PICTURE)
    folder = photo_folder(tmp_path / "d")

    report = pack(str(folder), model, tmp_path / "out.npz")

    data = opened(tmp_path / "out.npz", model, tmp_path / "s")
    assert (data.train_examples, data.test_examples) == (8, 2)
    assert report.examples == {"train": 8, "test": 2}
    assert report.classes == {"train": [4, 4], "test": [1, 1]}
    assert classes_path(tmp_path / "out.npz").read_text() == "cat\ndog\n"
    assert not report.faults.total and not report.warnings.total


def test_rows_are_the_resized_pixels_over_255(tmp_path):
    model = make_model(PICTURE)
    folder = photo_folder(tmp_path / "d")

    pack(str(folder), model, tmp_path / "out.npz", ALL_TRAIN)

    rows = values(opened(tmp_path / "out.npz", model, tmp_path / "s"), "train", "image")
    with Pillow.open(folder / "photos" / "1.png") as image:
        expected = np.asarray(image.resize((12, 8), Pillow.Resampling.BILINEAR), np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_array_equal(rows[1], expected)


def test_three_modalities_from_a_table_with_splits(tmp_path):
    model = make_model(PICTURE, SOUND, TEXT, MOTION)
    rows = []
    for index in range(6):
        write_image(tmp_path / "d" / f"i{index}.png", seed=index)
        write_sound(tmp_path / "d" / f"s{index}.wav", seed=index)
        np.savetxt(
            tmp_path / "d" / f"m{index}.csv", np.arange(16).reshape(8, 2) + index, delimiter=",", header="x,y", comments=""
        )
        split = "test" if index == 4 else "train"
        rows.append((f"i{index}.png", f"s{index}.wav", f"text number {index}", f"m{index}.csv", index % 2, split))
    table = write_table(tmp_path / "d", ("image", "audio", "text", "motion", "label", "split"), rows)

    report = pack(str(table / "examples.csv"), model, tmp_path / "out.npz")

    data = opened(tmp_path / "out.npz", model, tmp_path / "s")
    assert data.modalities == ("audio", "image", "motion", "text")
    assert (data.train_examples, data.test_examples) == (5, 1)
    np.testing.assert_array_equal(values(data, "test", "label"), [0])
    np.testing.assert_array_equal(values(data, "test", "motion")[0], (np.arange(16).reshape(8, 2) + 4).T)
    tokens = open_tokenizer("words", 300)("text number 4")
    np.testing.assert_array_equal(values(data, "test", "text")[0], [*tokens, 0, 0, 0])
    assert report.notes == [
        "audio: 6 sounds shorter than 0.065 s, filled with silence",
        "text: 6 texts made into tokens by 'words'",
    ]


@pytest.mark.parametrize("form", ["npz", "compressed", "npy"])
def test_arrays_of_any_number_type_are_cast(tmp_path, form):
    model = make_model(MOTION, TEXT)
    generator = np.random.default_rng(0)
    arrays = {
        "motion": generator.normal(size=(20, 2, 8)),
        "text": generator.integers(0, 300, (20, 6)).astype(np.int16),
        "label": (np.arange(20) % 2).astype(np.float32),
    }
    source = tmp_path / "in.npz"
    if form == "npy":
        source = tmp_path / "in"
        source.mkdir()
        for name, array in arrays.items():
            np.save(source / f"{name}.npy", array)
    else:
        (np.savez if form == "npz" else np.savez_compressed)(source, **arrays)

    pack(str(source), model, tmp_path / "out.npz", ALL_TRAIN)

    data = opened(tmp_path / "out.npz", model, tmp_path / "s")
    for name in arrays:
        np.testing.assert_array_equal(values(data, "train", name), arrays[name].astype(data.rows("train", name).dtype))


def test_arrays_that_are_split_stay_split(tmp_path):
    model = make_model(MOTION)
    sizes = {"train": 5, "test": 3}
    np.savez(
        tmp_path / "in.npz",
        **{f"{split}_motion": np.random.default_rng(n).normal(size=(n, 2, 8)) for split, n in sizes.items()},
        **{f"{split}_label": np.arange(n) % 2 for split, n in sizes.items()},
    )
    assert pack(str(tmp_path / "in.npz"), model, tmp_path / "out.npz").examples == sizes


def test_grey_images_without_a_channel_axis_and_bytes_are_scaled(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6), np.uint8)
    np.savez(tmp_path / "in.npz", image=pixels, label=[0, 1, 0, 1])
    model = make_model(GREY)

    pack(str(tmp_path / "in.npz"), model, tmp_path / "out.npz", ALL_TRAIN)

    rows = values(opened(tmp_path / "out.npz", model, tmp_path / "s"), "train", "image")
    np.testing.assert_array_equal(rows, pixels[:, None].astype(np.float32) / 255)


def test_one_npy_file_is_the_one_modality_with_its_label_beside_it(tmp_path):
    np.save(tmp_path / "windows.npy", np.random.default_rng(0).normal(size=(4, 2, 8)))
    np.save(tmp_path / "label.npy", np.array([0, 1, 0, 1]))
    report = pack(str(tmp_path / "windows.npy"), make_model(MOTION), tmp_path / "out.npz", ALL_TRAIN)
    assert report.examples["train"] == 4


CLASSES = """
import numpy as np
from PIL import Image

class Pairs:
    def __iter__(self):
        for index in range(6):
            pixels = np.full((5, 5, 3), 40 * index, np.uint8)
            pixels[0] = 255
            yield {"image": Image.fromarray(pixels), "text": f"no {index}", "label": index % 2,
                   "split": "test" if index > 3 else "train"}

class Indexed:
    def __len__(self):
        return 5
    def __getitem__(self, index):
        if index == 2:
            raise RuntimeError("sensor fell off")
        return {"image": np.random.default_rng(index).random((3, 8, 12)), "text": [1, 2, index + 1], "label": index % 2}

def generator():
    yield {"image": np.zeros((3, 8, 12)), "text": "a", "label": 0}
    raise RuntimeError("cable cut")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_examples.py").write_text(CLASSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_examples"
    import sys

    sys.modules.pop("own_examples", None)


def test_a_python_class_gives_images_texts_and_splits(tmp_path, own_module):
    model = make_model(PICTURE, TEXT)
    report = pack(f"{own_module}:Pairs", model, tmp_path / "out.npz")
    data = opened(tmp_path / "out.npz", model, tmp_path / "s")
    assert report.examples == {"train": 4, "test": 2}
    np.testing.assert_array_equal(values(data, "test", "label"), [0, 1])


def test_a_python_class_that_raises_loses_one_example_and_a_generator_the_rest(tmp_path, own_module):
    model = make_model(PICTURE, TEXT)
    report = check(f"{own_module}:Indexed", model, ALL_TRAIN)
    assert report.faults.lines() == ["own_examples:Indexed[2]: the class raised RuntimeError: sensor fell off"]
    assert report.examples["train"] == 4
    report = check(f"{own_module}:generator", model, ALL_TRAIN)
    assert report.faults.lines() == ["own_examples:generator[1]: the class raised RuntimeError: cable cut; nothing follows it"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent_module:A", "no module 'absent_module'"), ("own_examples:Absent", "no attribute 'Absent'")],
)
def test_a_python_name_that_is_not_there_is_refused(own_module, name, words):
    with pytest.raises(DataError, match=words):
        check(name, make_model(PICTURE))


def coco_options(**changes):
    from pathlib import Path

    places = {"captions": Path("annotations/captions_train2017.json"), "images": Path("train2017")}
    return Options(source=SourceSettings(**(places | changes)), test_share=None)


def test_coco_captions_are_joined_by_image_id_and_stripped(tmp_path):
    model = make_model(PICTURE, TEXT, classes=0)
    root = coco_tree(tmp_path / "coco")

    pack(str(root), model, tmp_path / "out.npz", coco_options())

    data = opened(tmp_path / "out.npz", model, tmp_path / "s")
    assert data.train_examples == 6
    tokenize = open_tokenizer("words", 300)
    for index, row in enumerate(values(data, "train", "text")):
        np.testing.assert_array_equal(row, [*tokenize(f"Photo {index} seen 0"), 0, 0])


def test_all_captions_of_an_image_stay_in_one_split(tmp_path):
    model = make_model(PICTURE, TEXT, classes=0)
    root = coco_tree(tmp_path / "coco", count=10)
    options = Options(source=coco_options(caption="all").source, test_share=0.3)
    report = pack(str(root), model, tmp_path / "out.npz", options)
    assert report.examples == {"train": 21, "test": 9}
    assert not report.warnings.total


def test_a_random_caption_depends_on_seed_and_image_alone(tmp_path):
    model = make_model(PICTURE, TEXT, classes=0)
    root = coco_tree(tmp_path / "coco")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        pack(str(root), model, tmp_path / f"{name}.npz", coco_options(caption="random", seed=seed))
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("roots", [("vision", "sound"), ("Dataset_v3_vision", "Dataset_v3_sound"), ("image", "audio")])
def test_advance_is_paired_by_class_and_stem_and_a_recording_stays_in_one_split(tmp_path, roots):
    model = make_model(PICTURE, SOUND)
    root = advance_tree(tmp_path / "d", roots, per_class=20)

    report = pack(str(root), model, tmp_path / "out.npz", Options(test_share=0.2))

    opened(tmp_path / "out.npz", model, tmp_path / "s")
    assert report.names == ("beach", "sports land")
    assert report.classes == {"train": [16, 16], "test": [4, 4]}
    assert "one recording in one split" in report.source
    # Each recording has two variants of both classes with equal pixels: none is on both sides.
    assert not report.warnings.total


def test_class_folders_of_one_modality_need_no_table(tmp_path):
    for label in ("0", "1", "10"):
        write_image(tmp_path / "d" / label / "x.png", seed=int(label))
    report = check(str(tmp_path / "d"), make_model(PICTURE, classes=11), ALL_TRAIN)
    assert report.classes["train"] == [1, 1, *[0] * 8, 1]


def test_another_name_for_a_modality(tmp_path):
    write_image(tmp_path / "d" / "x.png")
    write_table(tmp_path / "d", ("picture", "label"), [("x.png", 0)])
    options = Options(source=SourceSettings(names={"image": "picture"}), test_share=None)
    assert check(str(tmp_path / "d"), make_model(PICTURE), options).examples["train"] == 1


def test_a_waveform_is_the_samples_over_32768(tmp_path):
    written = write_sound(tmp_path / "d" / "x.wav", samples=300, channels=2)
    write_table(tmp_path / "d", ("file", "label"), [("x.wav", 1)])
    model = make_model(WAVEFORM)

    pack(str(tmp_path / "d"), model, tmp_path / "out.npz", ALL_TRAIN)

    row = values(opened(tmp_path / "out.npz", model, tmp_path / "s"), "train", "audio")[0]
    np.testing.assert_allclose(row[:300], written.mean(axis=1) / 32768, atol=1e-7)
    assert not row[300:].any()


def test_mean_and_std_for_each_channel(tmp_path):
    folder = photo_folder(tmp_path / "d")
    model, moved = make_model(PICTURE), Settings(mean={"image": (0.5, 0.4, 0.3)}, std={"image": (0.2,)})
    pack(str(folder), model, tmp_path / "plain.npz", ALL_TRAIN)
    pack(str(folder), model, tmp_path / "moved.npz", Options(test_share=None, convert=moved))
    plain, scaled = (values(opened(tmp_path / f"{n}.npz", model, tmp_path / n), "train", "image") for n in ("plain", "moved"))
    mean = np.array([0.5, 0.4, 0.3], np.float32)[:, None, None]
    np.testing.assert_allclose(scaled, (plain - mean) / 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: photo_folder(p, 1), "folder"),
        (lambda p: photo_folder(p, 1) / "examples.csv", "folder"),
        (lambda p: coco_tree(p, 1) / "annotations" / "captions_train2017.json", "coco"),
        (advance_tree, "advance"),
        (lambda p: "package.module:Name", "class"),
    ],
)
def test_the_kind_is_seen_from_the_path(tmp_path, make, kind):
    assert find_kind(str(make(tmp_path / "d")), SourceSettings()) == kind


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_kind(str(tmp_path / "none"), SourceSettings())
    with pytest.raises(DataError, match=r"has no CSV table, no .npy arrays and no class folders"):
        find_kind(str(tmp_path), SourceSettings())


def test_a_second_pair_of_captions_and_images_are_the_test_examples(tmp_path):
    root = coco_tree(tmp_path / "coco")
    other = coco_tree(tmp_path / "other", count=2)
    options = coco_options(
        test_captions=other / "annotations" / "captions_train2017.json", test_images=other / "train2017", caption="all"
    )
    report = check(str(root), make_model(PICTURE, TEXT, classes=0), options)
    assert report.examples == {"train": 18, "test": 6}


def test_rows_of_one_group_stay_together_in_a_table_of_tabs(tmp_path):
    rows = [(f"{index}.png", index % 2, f"person {index // 4}") for index in range(20)]
    for index, (name, *_) in enumerate(rows):
        write_image(tmp_path / "d" / name, seed=index // 4)
    text = "\n".join("\t".join(map(str, row)) for row in [("image", "label", "group"), *rows])
    (tmp_path / "d" / "list.tsv").write_text(text)
    report = check(str(tmp_path / "d"), make_model(PICTURE), Options(test_share=0.4))
    assert report.examples == {"train": 12, "test": 8}
    # All pictures of a person are equal, so a person on both sides would be a warning.
    assert not report.warnings.total


@pytest.mark.parametrize(("labels", "names"), [(["b", "a"], ("a", "b")), (["1", "0"], None)])
def test_labels_of_arrays_may_be_names(tmp_path, labels, names):
    np.savez(tmp_path / "in.npz", motion=np.random.default_rng(0).normal(size=(2, 2, 8)), label=labels)
    report = check(str(tmp_path / "in.npz"), make_model(MOTION), ALL_TRAIN)
    assert (report.names, report.faults.total, report.classes["train"]) == (names, 0, [1, 1])
