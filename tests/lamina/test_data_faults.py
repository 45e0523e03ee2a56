"""The validator names every item that is wrong, what is wrong with it, the value and what was expected."""

import json
import re

import numpy as np
import pytest
from PIL import Image as Pillow

from lamina.data.convert import Settings
from lamina.data.pack import Options, check, pack
from lamina.data.sources import SourceSettings
from lamina.errors import ConfigError, DataError
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


def faults_of(source, model, options=ALL_TRAIN):
    return check(str(source), model, options).faults.lines()


@pytest.fixture
def photos(tmp_path):
    return photo_folder(tmp_path / "d")


def damage(photos):
    """Two files that cannot be read, one that is empty and one that is gone."""
    (photos / "photos" / "1.png").write_bytes(b"no image")
    whole = (photos / "photos" / "3.jpg").read_bytes()
    (photos / "photos" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "photos" / "4.png").write_bytes(b"")
    (photos / "photos" / "8.png").unlink()


def test_every_bad_file_of_a_table_is_reported_with_its_line(photos):
    damage(photos)
    found = faults_of(photos, make_model(PICTURE))
    assert len(found) == 4
    assert re.fullmatch(r"examples.csv line 3 \(photos/1.png\): image 1.png: is no readable image: cannot identify.*", found[0])
    assert re.fullmatch(
        r"examples.csv line 5 \(photos/3.jpg\): image 3.jpg: is no readable image: (?i:.*truncated.*)", found[1]
    )
    assert found[2] == "examples.csv line 6 (photos/4.png): image 4.png: the file has 0 bytes"
    assert found[3] == "examples.csv line 10 (photos/8.png): image 8.png: the file is missing"


def test_packing_refuses_faults_or_leaves_them_out_and_says_how_many(photos, tmp_path):
    damage(photos)
    model, out = make_model(PICTURE), tmp_path / "out.npz"

    with pytest.raises(DataError, match=r"has 4 faults(.|\n)*line 3(.|\n)*line 10"):
        pack(str(photos), model, out, ALL_TRAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]

    report = pack(str(photos), model, out, ALL_TRAIN, skip_bad=True)
    assert (report.left_out, report.faults.total, report.examples["train"]) == (4, 4, 6)
    assert opened(out, model, tmp_path / "s").train_examples == 6


def test_faults_are_counted_beyond_the_limit(photos):
    for file in (photos / "photos").iterdir():
        file.write_bytes(b"")
    found = faults_of(photos, make_model(PICTURE), Options(test_share=None, max_faults=3))
    assert len(found) == 4 and found[-1] == "and 7 more"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (("fil", "label"), "has no column 'image', it has fil, label"),
        (("imag", "label"), "has no column 'image', it has imag, label; did you mean 'imag'. .*--rename image=imag"),
        (("file", "lable"), "has no column 'label', it has file, lable; did you mean 'lable'"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(photos, columns, words):
    write_table(photos, columns, [("photos/0.jpg", 0)])
    with pytest.raises(DataError, match=words):
        check(str(photos), make_model(PICTURE), ALL_TRAIN)


def test_a_modality_that_the_source_lacks_is_named(photos, tmp_path):
    with pytest.raises(DataError, match=r"has no column 'audio', it has file, label"):
        check(str(photos), make_model(PICTURE, SOUND), ALL_TRAIN)
    advance = advance_tree(tmp_path / "a")
    with pytest.raises(DataError, match=r"has no folder for 'motion' .*it has sound, vision"):
        check(str(advance), make_model(PICTURE, SOUND, MOTION), ALL_TRAIN)
    np.savez(tmp_path / "in.npz", motions=np.zeros((2, 2, 8)), label=[0, 1])
    with pytest.raises(DataError, match=r"no array 'motion', it has motions, label; did you mean 'motions'. .*motion=motions"):
        check(str(tmp_path / "in.npz"), make_model(MOTION), ALL_TRAIN)


def table(folder, rows, columns=("file", "label")):
    write_image(folder / "a.png", seed=1)
    write_image(folder / "b.png", seed=2)
    return write_table(folder, columns, rows)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([("a.png", 0), ("b.png", 2)], "examples.csv line 3 (b.png): label 2 is outside of 0..1"),
        ([("a.png", 0), ("b.png", "")], "examples.csv line 3 (b.png): has no label; expected one of 2 classes"),
        ([("a.png", 0), ("a.png", 1)], "examples.csv line 3 (a.png): is the same example as examples.csv line 2 (a.png)"),
        ([("a.png", 0), ("b.png",)], "examples.csv line 3: has more or fewer cells than the 2 columns"),
        ([("a.png", 0), ("", 1)], "examples.csv line 3: the column 'file' is empty"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, rows, fault):
    assert faults_of(table(tmp_path / "d", rows), make_model(PICTURE)) == [fault]


def test_a_split_that_is_none_is_named(tmp_path):
    folder = table(tmp_path / "d", [("a.png", 0, "train"), ("b.png", 1, "val")], ("file", "label", "split"))
    assert faults_of(folder, make_model(PICTURE)) == ["examples.csv line 3 (b.png): split 'val' is neither train nor test"]


def test_class_names_need_one_name_for_each_class_or_a_list(tmp_path):
    folder, names = table(tmp_path / "d", [("a.png", "cat"), ("b.png", "dog")]), tmp_path / "names.txt"
    (fault,) = faults_of(folder, make_model(PICTURE, classes=3))
    assert re.search(r"has 2 class names \(cat, dog\), the model 3 classes: .*--classes FILE", fault)
    names.write_text("bird\ncat\n\ndog\n")
    report = check(str(folder), make_model(PICTURE, classes=3), Options(test_share=None, classes=names))
    assert report.classes["train"] == [0, 1, 1]
    assert report.warnings.lines() == ["class 0 (bird): has no example in train"]

    names.write_text("bird\ncat\nfish\n")
    report = check(str(folder), make_model(PICTURE, classes=3), Options(test_share=None, classes=names))
    assert report.faults.lines() == ["examples.csv line 3 (b.png): label 'dog' is not among the 3 classes: bird, cat, fish"]
    names.write_text("bird\ncat\n")
    with pytest.raises(DataError, match=r"2 classes are named \(bird, cat\), the model has 3"):
        check(str(folder), make_model(PICTURE, classes=3), Options(classes=names))
    with pytest.raises(DataError, match="the class 'a' is named twice"):
        check(str(folder), make_model(PICTURE, classes=2), Options(classes="a,a"))
    report = check(str(folder), make_model(PICTURE, classes=3), Options(test_share=None, classes="bird,cat,dog"))
    assert report.classes["train"] == [0, 1, 1]


def test_names_that_are_too_many_are_named_with_their_row_and_hide_no_other_fault(tmp_path):
    rows = [("a.png", "x"), ("b.png", "y"), ("a.png", "x"), ("none.png", "y"), ("b.png", "z")]
    folder, model = table(tmp_path / "d", rows), make_model(PICTURE)
    found = faults_of(folder, model)
    assert "the source has 3 class names (x, y, z), the model 2 classes" in found[0]
    assert found[1:] == [
        "examples.csv line 4 (a.png): is the same example as examples.csv line 2 (a.png)",
        "examples.csv line 5 (none.png): image none.png: the file is missing",
        "examples.csv line 6 (b.png): label 'z' is one name too many for 2 classes; the others are at least as frequent",
        "examples.csv line 6 (b.png): is the same example as examples.csv line 3 (b.png)",
    ]
    with pytest.raises(DataError, match=r"5 faults; mend them:\n.* the source has 3 class names"):
        pack(str(folder), model, tmp_path / "out.npz", ALL_TRAIN, skip_bad=True)
    assert not (tmp_path / "out.npz").exists()


def labelled(folder, labels):
    for index in range(len(labels)):
        write_image(folder / f"{index}.png", seed=index)
    return write_table(folder, ("file", "label"), [(f"{index}.png", label) for index, label in enumerate(labels)])


@pytest.mark.parametrize("stray", ["?", "nan", "NaN", "", "cat", "3.5", "1e1", "inf", "-", "None", "n/a", "0x1", "1_0", "½"])
def test_a_stray_word_among_integers_is_a_fault_of_its_line_and_makes_no_names(tmp_path, stray):
    report = check(str(labelled(tmp_path / "d", [*range(11), stray])), make_model(PICTURE, classes=12), ALL_TRAIN)
    (fault,) = report.faults.lines()
    assert fault.startswith("examples.csv line 13 (11.png): ") and ("integer" in fault or "has no label" in fault)
    assert report.names is None and report.classes["train"] == [1] * 11 + [0]


@pytest.mark.parametrize(("label", "index"), [(" 7 ", 7), ("3.0", 3), ("+2", 2), ("007", 7), ("4.", 4)])
def test_an_integer_may_be_written_in_several_ways(tmp_path, label, index):
    report = check(str(labelled(tmp_path / "d", [0, label])), make_model(PICTURE, classes=9), ALL_TRAIN)
    assert not report.faults.total and report.classes["train"][index] == 1


@pytest.mark.parametrize("label", ["-1", "12", "9" * 300, "9" * 5000, "-0.5"])
def test_an_integer_that_is_no_class_is_a_fault_and_no_crash(tmp_path, label):
    (fault,) = faults_of(labelled(tmp_path / "d", [0, label]), make_model(PICTURE, classes=9))
    assert "line 3" in fault and len(fault) < 300


@pytest.mark.parametrize("stray", ["nan", "?", "", "3", "cat", "Dog", "a" * 101, "d\x07g", "dog\u200b"])
def test_among_names_a_word_for_nothing_a_number_or_another_spelling_is_a_fault(tmp_path, stray):
    labels = ["Cat", "dog", "Cat", "dog", stray]
    report = check(str(labelled(tmp_path / "d", labels)), make_model(PICTURE, classes=2), ALL_TRAIN)
    assert [fault for fault in report.faults.lines() if "line 6" in fault]
    assert report.names == ("Cat", "dog") and report.classes["train"] == [2, 2]


def test_indices_go_with_names_that_are_given_but_are_not_mixed_with_them(tmp_path):
    options = Options(test_share=None, classes="cat,dog")
    report = check(str(labelled(tmp_path / "a", [0, 1, 1])), make_model(PICTURE), options)
    assert not report.faults.total and report.classes["train"] == [1, 2]
    report = check(str(labelled(tmp_path / "b", ["cat", "dog", 1])), make_model(PICTURE), options)
    assert report.faults.lines() == ["examples.csv line 4 (2.png): label '1' is not among the 2 classes: cat, dog"]


def test_labels_of_arrays_follow_the_same_rules(tmp_path):
    texts = np.array(["0", "1", "nan", "x"])
    assert len(faults_of(save(tmp_path, motion=WINDOWS, label=texts), make_model(MOTION, classes=3))) == 2
    for labels in ([True, False, True, True], [0.0, np.nan, 1.0, 1.0]):
        assert faults_of(save(tmp_path, motion=WINDOWS, label=labels), make_model(MOTION))


def test_pairs_with_classes_have_labels_too(tmp_path):
    model = make_model(MOTION, TEXT, classes=0)
    model = model.model_copy(update={"objective": model.objective.model_copy(update={"classes": 2})})
    arrays = {"motion": WINDOWS, "text": np.arange(24).reshape(4, 6)}
    with pytest.raises(DataError, match="no array 'label'"):
        check(str(save(tmp_path, **arrays)), model)
    pack(str(save(tmp_path, **arrays, label=[0, 1, 0, 1])), model, tmp_path / "out.npz", ALL_TRAIN)
    assert values(opened(tmp_path / "out.npz", model, tmp_path / "s"), "train", "label").tolist() == [0, 1, 0, 1]


def save(tmp_path, **arrays):
    np.savez(tmp_path / "in.npz", **arrays)
    return tmp_path / "in.npz"


def spoiled(array, place, value):
    copy = np.array(array, float)
    copy[place] = value
    return copy


WINDOWS = np.random.default_rng(0).normal(size=(4, 2, 8))
BEYOND = "is beyond +-1,000,000; if it is real, scale all of them: --mean motion=M --std motion=S"


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"motion": spoiled(WINDOWS, (2, 1, 3), np.nan)}, "motion[2]: motion: value nan at index [1, 3] is not finite"),
        ({"motion": spoiled(WINDOWS, (2, 1, 3), 1e300)}, "motion[2]: motion: value inf at index [1, 3] is not finite"),
        ({"motion": spoiled(WINDOWS, (2, 1, 3), 1e36)}, f"motion[2]: motion: value 1e+36 at index [1, 3] {BEYOND}"),
        ({"motion": spoiled(WINDOWS, (0, 0, 0), -1.1e6)}, f"motion[0]: motion: value -1.1e+06 at index [0, 0] {BEYOND}"),
        ({"label": np.array([0, 1, 2**62, 0])}, f"motion[2]: label {2**62} is outside of 0..1"),
        ({"label": [0, 1, 0.5, 0]}, "motion[2]: label 0.5 is not an integer; expected one in 0..1"),
        ({"label": [0, 1, -1, 0]}, "motion[2]: label -1 is outside of 0..1"),
        ({"motion": WINDOWS[:3]}, "in.npz: arrays of unequal length: motion 3, label 4 rows"),
    ],
)
def test_a_bad_array_value_is_named_with_its_index(tmp_path, monkeypatch, arrays, fault):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, **({"motion": WINDOWS, "label": [0, 1, 0, 1]} | arrays))
    assert faults_of("in.npz", make_model(MOTION)) == [fault]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (WINDOWS.transpose(0, 2, 1), r"has shape \(8, 2\), the model takes \(2, 8\): it is turned; use .T"),
        (WINDOWS[:, :, :5], r"has shape \(2, 5\), the model takes \(2, 8\)"),
    ],
)
def test_a_wrong_shape_is_named_with_the_way_out(tmp_path, rows, words):
    found = faults_of(save(tmp_path, motion=rows, label=[0, 1, 0, 1]), make_model(MOTION))
    assert len(found) == 4 and re.search(words, found[0])


def test_images_with_channels_last_are_told_so(tmp_path):
    found = faults_of(save(tmp_path, image=np.random.default_rng(0).random((1, 8, 12, 3)), label=[0]), make_model(PICTURE))
    assert found[0].endswith("it is height, width, channels; use .transpose(2, 0, 1)")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ([[1, 2, 300]], "text[0]: text: token 300 at place 2 is outside of 0..299"),
        ([[1, -2, 3]], "text[0]: text: token -2 at place 1 is outside of 0..299"),
        ([[1, 2.5, 3]], "text[0]: text: token 2.5 at place 1 is no integer"),
    ],
)
def test_a_token_that_is_none_is_named(tmp_path, text, fault):
    assert faults_of(save(tmp_path, text=text, label=[0]), make_model(TEXT)) == [fault]


def test_an_empty_text_is_named(tmp_path):
    folder = write_table(tmp_path / "d", ("text", "label"), [("good words", 0), ("  ", 1)])
    assert faults_of(folder, make_model(TEXT)) == ["examples.csv line 3 (): text: the text is empty"]


def test_halves_of_pairs_and_stems_with_two_files_are_named(tmp_path):
    root = advance_tree(tmp_path / "a")
    (root / "sound" / "beach" / "07000_1.wav").unlink()
    write_sound(root / "sound" / "beach" / "alone.wav")
    write_image(root / "vision" / "sports land" / "07001_0.png")

    report = check(str(root), make_model(PICTURE, SOUND), ALL_TRAIN)

    assert report.faults.lines() == [
        "vision/beach/07000_1.jpg: has no audio: expected sound/beach/07000_1.*",
        "sound/beach/alone.wav: has no image: expected vision/beach/alone.*",
        "vision/sports land/07001_0.jpg: is one of 2 files of the stem '07001_0': 07001_0.jpg, 07001_0.png",
    ]
    assert (report.left_out, report.examples["train"]) == (3, 8)


def test_coco_faults_are_named_and_missing_files_counted(tmp_path):
    root = coco_tree(tmp_path / "coco")
    for number in (1000, 1021):
        (root / "train2017" / f"{number:012d}.jpg").unlink()
    file = root / "annotations" / "captions_train2017.json"
    whole = json.loads(file.read_text())
    whole["annotations"] = [note for note in whole["annotations"] if note["image_id"] != 1007]
    whole["annotations"] += [{"id": 900, "image_id": 5, "caption": "x"}, {"id": 901, "image_id": 1014, "caption": "\n "}]
    whole["images"].append(whole["images"][-1])
    file.write_text(json.dumps(whole))
    options = Options(source=SourceSettings(captions=file.absolute(), images=root / "train2017"), test_share=None)

    report = check(str(root), make_model(PICTURE, TEXT, classes=0), options)

    assert report.faults.lines() == [
        "captions_train2017.json, image 1035: its id stands 2 times in `images`",
        "captions_train2017.json, annotation 900: names image 5, which is not in `images`",
        "captions_train2017.json, annotation 901 of 000000001014.jpg: the caption is empty",
        f"{root / 'train2017'}: 2 of 6 image files are missing, the first is 000000001000.jpg",
        "captions_train2017.json, image 1007 (000000001007.jpg): has no caption",
    ]
    assert report.examples["train"] == 3


def test_coco_cannot_serve_labels_or_a_third_modality(tmp_path):
    options = Options(source=SourceSettings(captions=coco_tree(tmp_path / "c") / "annotations" / "captions_train2017.json"))
    with pytest.raises(DataError, match="have no labels"):
        check(str(tmp_path / "c"), make_model(PICTURE, TEXT), options)
    with pytest.raises(DataError, match="the model also takes 'audio'"):
        check(str(tmp_path / "c"), make_model(PICTURE, SOUND, TEXT), options)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: write_sound(p, width=1), "has 8 bits for each sample, 16 are expected: ffmpeg"),
        (lambda p: p.write_bytes(b"RIFFxxxx"), "is no readable PCM WAV file"),
        (lambda p: write_sound(p, samples=0), "holds no samples"),
        (lambda p: p.write_bytes(write_sound(p) is not None and p.read_bytes()[:500]), "is cut off: it has 228 of"),
    ],
)
def test_a_sound_that_cannot_be_read_is_named(tmp_path, write, words):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "x.wav")
    write_table(tmp_path / "d", ("file", "label"), [("x.wav", 1)])
    (found,) = faults_of(tmp_path / "d", make_model(WAVEFORM))
    assert found.startswith("examples.csv line 2 (x.wav): audio x.wav: ") and words in found


def test_a_file_of_another_sort_than_the_input_is_named(tmp_path):
    write_sound(tmp_path / "d" / "x.wav")
    write_table(tmp_path / "d", ("file", "label"), [("x.wav", 1)])
    (found,) = faults_of(tmp_path / "d", make_model(PICTURE))
    assert "is a sound, but the model takes image_patches" in found
    (tmp_path / "d" / "x.wav").rename(tmp_path / "d" / "x.png")
    write_table(tmp_path / "d", ("file", "label"), [("x.png", 1)])
    (found,) = faults_of(tmp_path / "d", make_model(WAVEFORM))
    assert "is read as an image, but the model takes values of shape (400,)" in found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1,2\n3,x\n", "line 2 is not numbers"),
        ("1,x\n3,4\n", "line 1 is not numbers: 'x'"),
        ("1,2\n3\n", "line 2 has 1 numbers"),
        ("a,b\n", "no rows of numbers"),
        ("1,5;2,5\n1.5;2\n", "line 2 has a number with a comma, others have points"),
        ("1.000,5;2\n", "line 1 is not numbers: '1.000,5'"),
        ("1;2\n1.000,5;2\n", "line 2 is not numbers: '1.000,5'"),
    ],
)
def test_a_table_of_sensor_values_is_read_with_care(tmp_path, content, words):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.csv").write_text(content)
    write_table(tmp_path / "d", ("motion", "label"), [("x.csv", 1)])
    (found,) = faults_of(tmp_path / "d" / "examples.csv", make_model(MOTION))
    assert words in found


def test_constant_values_and_test_examples_that_are_in_train_too_are_warnings(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("copy", 1)):
        write_image(tmp_path / "d" / f"{name}.png", seed=seed)
    Pillow.new("RGB", (12, 8), (51, 51, 51)).save(tmp_path / "d" / "blank.png")
    rows = [("a.png", 0, "train"), ("b.png", 0, "train"), ("blank.png", 0, "train"), ("copy.png", 1, "test")]
    write_table(tmp_path / "d", ("file", "label", "split"), rows)

    report = check(str(tmp_path / "d"), make_model(PICTURE))

    assert not report.faults.total
    assert report.warnings.lines() == [
        "examples.csv line 4 (blank.png): image: all 288 values are 0.20000000298023224",
        "class 1: has no example in train, 1 in test",
        "examples.csv line 5 (copy.png): image: in test, and the same in train: examples.csv line 2 (a.png)",
    ]


def test_a_packed_file_is_checked_as_a_device_reads_it(tmp_path):
    good = {"train_motion": WINDOWS.astype(np.float32), "train_label": np.array([0, 1, 0, 1])}
    assert faults_of(save(tmp_path, **good), make_model(MOTION)) == []
    found = faults_of(save(tmp_path, **(good | {"train_motion": WINDOWS})), make_model(MOTION))
    assert found == ["in.npz, array 'train_motion': has dtype float64, a device takes float32; `lamina data pack` casts it"]
    found = faults_of(save(tmp_path, **(good | {"train_label": np.array([0, 5, 0, -1])})), make_model(MOTION))
    assert found == ["train_motion[1]: label 5 is outside of 0..1", "train_motion[3]: label -1 is outside of 0..1"]
    found = faults_of(save(tmp_path, **(good | {"train_motion": WINDOWS[:, :1].astype(np.float32)})), make_model(MOTION))
    assert found == ["in.npz, array 'train_motion': has rows of shape (1, 8), the model takes (2, 8)"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{}] * 2), "holds Python objects"),
        (np.asfortranarray(WINDOWS), "is in Fortran order"),
        (np.array(1.0), "is a single value"),
    ],
)
def test_an_array_that_no_device_could_read_is_refused(tmp_path, array, words):
    with pytest.raises(DataError, match=words):
        check(str(save(tmp_path, motion=array, label=[0, 1])), make_model(MOTION))


def test_an_archive_that_is_damaged_or_none_is_refused(tmp_path):
    path = save(tmp_path, motion=np.random.default_rng(0).normal(size=(4000, 2, 8)), label=np.zeros(4000))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="array 'motion' is damaged near row"):
        check(str(path), make_model(MOTION))
    path.write_bytes(data[:3000])
    with pytest.raises(DataError, match=r"is no \.npz file"):
        check(str(path), make_model(MOTION))


@pytest.mark.parametrize(
    ("mode", "model"), [("RGBA", make_model(PICTURE)), ("L", make_model(PICTURE)), ("I;16", make_model(GREY))]
)
def test_images_of_other_modes_are_converted(tmp_path, mode, model):
    write_image(tmp_path / "d" / "x.png", mode=mode)
    write_table(tmp_path / "d", ("file", "label"), [("x.png", 1)])
    pack(str(tmp_path / "d"), model, tmp_path / "out.npz", ALL_TRAIN)
    row = values(opened(tmp_path / "out.npz", model, tmp_path / "s"), "train", "image")
    assert 0 <= row.min() < 0.4 < 0.6 < row.max() <= 1


def test_a_package_that_is_missing_is_answered_with_the_extra(tmp_path, monkeypatch):
    folder = photo_folder(tmp_path / "d", 1)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"needs pillow, which is not installed: pip install 'lamina\[data\]'"):
        check(str(folder), make_model(PICTURE, classes=2), Options(classes=write_names(tmp_path)))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    texts = write_table(tmp_path / "t", ("text", "label"), [("a", 0)])
    options = Options(convert=Settings(tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(ConfigError, match=r"needs tokenizers, which is not installed: pip install 'lamina\[data\]'"):
        check(str(texts), make_model(TEXT), options)


def write_names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return tmp_path / "names.txt"


def _without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


GOOD = {
    "train_motion": WINDOWS.astype(np.float32),
    "train_label": np.array([0, 1, 0, 1]),
    "test_motion": WINDOWS[:2].astype(np.float32),
    "test_label": np.array([0, 1]),
}


@pytest.mark.parametrize(
    "arrays",
    [
        GOOD,
        _without(_without(GOOD, "test_motion"), "test_label"),
        _without(GOOD, "test_motion"),
        _without(GOOD, "test_label"),
        _without(GOOD, "train_label"),
        GOOD | {"train_other": np.zeros((4, 3))},
        GOOD | {"train_other": np.zeros((3, 3))},
        GOOD | {"test_other": np.zeros((2, 3))},
        GOOD | {"extra": np.zeros((4, 3))},
        GOOD | {"train_Motion": np.zeros((4, 3))},
        GOOD | {"train_label": np.array([0, 1, 0, 2])},
        GOOD | {"train_label": np.array([0, 1, 0, 1], np.int32)},
        GOOD | {"test_motion": np.full((2, 2, 8), np.inf, np.float32)},
        GOOD | {"test_motion": np.zeros((2, 8), np.float32)},
        {name: array[:0] for name, array in GOOD.items()},
        _without(_without(GOOD, "test_motion"), "test_label")
        | {"test_other": np.zeros((2, 3)), "train_other": np.zeros((4, 3))},
    ],
    ids=lambda arrays: " ".join(f"{name}{array.dtype.char}{array.shape}" for name, array in arrays.items()).replace("::", ""),
)
@pytest.mark.parametrize("keep", [np.savez, np.savez_compressed])
def test_a_packed_file_has_no_faults_exactly_when_a_device_takes_it(tmp_path, arrays, keep):
    keep(tmp_path / "in.npz", **arrays)
    model = make_model(MOTION)
    try:
        opened(tmp_path / "in.npz", model, tmp_path / "s")
        is_taken = True
    except DataError:
        is_taken = False

    try:
        report = check(str(tmp_path / "in.npz"), model)
        is_good = not report.faults.total and report.examples["train"] > 0
    except DataError:
        is_good = False

    assert is_good == is_taken


def test_values_that_are_scaled_into_the_bound_are_taken(tmp_path):
    big = save(tmp_path, motion=WINDOWS * 1e9, label=[0, 1, 0, 1])
    assert len(faults_of(big, make_model(MOTION))) == 4
    assert faults_of(big, make_model(MOTION), Options(test_share=None, convert=Settings(std={"motion": (1e9,)}))) == []


@pytest.mark.parametrize("value", [1e36, -2e6, 3.4e38])
def test_a_device_refuses_extreme_values_as_the_check_does(tmp_path, value):
    path = save(tmp_path, **GOOD | {"test_motion": spoiled(WINDOWS[:2], (1, 0, 4), value).astype(np.float32)})
    with pytest.raises(DataError, match=r"'test_motion': value .* at index \[1, 0, 4\] is beyond \+-1,000,000"):
        opened(path, make_model(MOTION), tmp_path / "s")
    assert "test_motion[1]" in faults_of(path, make_model(MOTION))[0]


def test_an_image_that_is_a_line_and_a_sound_of_no_rate_are_refused(tmp_path):
    Pillow.new("L", (100_000, 1)).save(tmp_path / "line.png")
    write_table(tmp_path, ("file", "label"), [("line.png", 1)])
    assert "has 100000 x 1 pixels" in faults_of(tmp_path, make_model(GREY))[0]
    for index, rate in enumerate((4_000_000_000, 1)):
        path = tmp_path / str(index) / "x.wav"
        write_sound(path)
        data = bytearray(path.read_bytes())
        data[24:28] = rate.to_bytes(4, "little")
        path.write_bytes(data)
        write_table(path.parent, ("file", "label"), [("x.wav", 1)])
        assert f"says that it has {rate} samples a second" in faults_of(path.parent, make_model(WAVEFORM))[0]


def test_a_path_that_no_disk_takes_is_a_fault(tmp_path):
    (found,) = faults_of(write_table(tmp_path / "d", ("file", "label"), [("x" * 5000, 1)]), make_model(PICTURE))
    assert "the file cannot be read: File name too long" in found


def test_labels_that_are_numbers_with_a_decimal_comma_are_no_names(tmp_path):
    report = check(str(labelled(tmp_path / "d", ['"1,0"', '"0,0"'])), make_model(PICTURE), ALL_TRAIN)
    assert report.names is None
    assert [fault.split(": ")[1] for fault in report.faults.lines()] == [
        "label '1,0' is not an integer; expected one in 0..1; class names need --classes",
        "label '0,0' is not an integer; expected one in 0..1; class names need --classes",
    ]
