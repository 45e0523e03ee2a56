"""The card says what packing decided, is compared field by field, and gives the other devices the same options."""

import json
import wave
import zipfile

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_client.rows.local_data import LocalData
from lamina.cli.main import app
from lamina.data.card import MAX_NAMES_BYTES, DataCard, ModalityCard, classes_field, joined, numbers_field, read_card
from lamina.data.convert import Settings
from lamina.data.models import load_target
from lamina.data.pack import Options, check, pack
from lamina.data.sound import SoundSettings
from lamina.errors import ConfigError, DataError
from lamina.plans.plan import Plan
from tests.lamina.test_data_pack import write_plan
from tests.lamina.trees import (
    GREY,
    MOTION,
    PICTURE,
    SOUND,
    TEXT,
    WAVEFORM,
    make_model,
    photo_folder,
    write_sound,
    write_table,
)

ALL_TRAIN = Options(test_share=None)


def packed(tmp_path, source, model, name="out", **options):
    out = tmp_path / f"{name}.npz"
    pack(str(source), model, out, Options(**({"test_share": None} | options)))
    return out


def fields(path):
    return read_card(path).fields()


def test_a_card_of_photos_says_names_scaling_and_colours(tmp_path):
    settings = Settings(mean={"image": (0.5, 0.4, 0.3)}, std={"image": (0.1,)}, fit="crop")
    path = packed(tmp_path, photo_folder(tmp_path / "d"), make_model(PICTURE), convert=settings)
    assert fields(path) == {
        "classes": ["cat", "dog"],
        "image.shape": [3, 8, 12],
        "image.range": [0, 1],
        "image.mean": [0.5, 0.4, 0.3],
        "image.std": [0.1],
        "image.channels": ["red", "green", "blue"],
        "image.fit": "crop",
    }
    assert LocalData(path, tmp_path / "s").card == read_card(path)


def test_a_card_of_sounds_says_rate_window_and_hop(tmp_path):
    write_sound(tmp_path / "d" / "x.wav")
    write_table(tmp_path / "d", ("file", "label"), [("x.wav", 1)])
    sound = Settings(sound=SoundSettings(8000, 20.0, 5.0))
    frames = fields(packed(tmp_path, tmp_path / "d", make_model(SOUND), "frames", convert=sound))
    assert (frames["audio.rate"], frames["audio.window_ms"], frames["audio.hop_ms"]) == (8000, 20, 5)
    assert "audio.range" not in frames and "classes" not in frames
    waves = fields(packed(tmp_path, tmp_path / "d", make_model(WAVEFORM), "waves", convert=sound))
    assert waves["audio.rate"] == 8000 and waves["audio.range"] == [-1, 1] and "audio.hop_ms" not in waves


def test_a_card_of_texts_says_tokenizer_and_vocabulary(tmp_path):
    texts = write_table(tmp_path / "d", ("text", "label"), [("one two", 0), ("two three", 1)])
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "two": 1, "one": 2, "three": 3}, "unk_token": "[UNK]"},
            }
        )
    )
    card = fields(packed(tmp_path, texts, make_model(TEXT), "words"))
    assert (card["text.tokenizer"], card["text.vocabulary"]) == ("words", 300)
    card = fields(
        packed(tmp_path, texts, make_model(TEXT), "file", convert=Settings(tokenizer=str(tmp_path / "tokenizer.json")))
    )
    assert card["text.tokenizer"].startswith("sha256:") and card["text.vocabulary"] == 4
    assert card["text.tokens"] == ["[UNK]", "two", "one", "three"]
    np.savez(tmp_path / "in.npz", text=[[1, 2, 3]], label=[0])
    assert fields(packed(tmp_path, tmp_path / "in.npz", make_model(TEXT), "ids")) == {"text.shape": [6]}


def test_columns_of_sensor_tables_are_channels_and_their_order_must_stay(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for index, head in enumerate(("x;y", "x;y", "y;x")):
        rows = "\n".join(f"{i};{index},5" for i in range(8))
        (folder / f"{index}.csv").write_text(f"{head}\n{rows}\n")
    write_table(folder, ("motion", "label"), [("0.csv", 0), ("1.csv", 1), ("2.csv", 1)])
    report = check(str(folder / "examples.csv"), make_model(MOTION), ALL_TRAIN)
    (fault,) = report.faults.lines()
    assert "line 4" in fault and "has the columns y, x, the tables before it x, y" in fault
    assert report.card.fields()["motion.channels"] == ["x", "y"]


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (np.arange(72).reshape(2, 6, 6).astype(np.uint8), [0, 1]),
        (np.linspace(0, 1, 72).reshape(2, 6, 6), [0, 1]),
        (np.arange(72).reshape(2, 6, 6), [0, 255]),
        (np.linspace(-1, 1, 72).reshape(2, 6, 6), [-1, 1]),
        (np.linspace(-2, 2, 72).reshape(2, 6, 6), None),
    ],
)
def test_the_range_of_pixels_in_arrays_is_seen(tmp_path, pixels, wanted):
    np.savez(tmp_path / "in.npz", image=pixels, label=[0, 1])
    card = fields(packed(tmp_path, tmp_path / "in.npz", make_model(GREY)))
    assert card.get("image.range") == wanted
    # Pixels in no usual range were scaled before, nobody knows how.
    assert ("image.mean" in card) == (wanted is not None)


def test_a_card_changes_nothing_for_numpy_and_a_file_of_numpy_has_none(tmp_path):
    path = packed(tmp_path, photo_folder(tmp_path / "d"), make_model(PICTURE))
    with np.load(path) as arrays:
        assert sorted(arrays) == ["train_image", "train_label"]
        np.savez(tmp_path / "plain.npz", **arrays)
    assert read_card(tmp_path / "plain.npz") is None
    assert LocalData(tmp_path / "plain.npz", tmp_path / "s").card is None
    report = check(str(tmp_path / "plain.npz"), make_model(PICTURE), Options(card=DataCard(classes=("dog", "cat"))))
    assert not report.faults.total


@pytest.mark.parametrize("text", ["{", '{"classes": 3}', '{"colour": 1}', '{"classes": ["a\\u001b[2J"]}', '{"classes": []}'])
def test_a_damaged_card_is_named(tmp_path, text):
    path = packed(tmp_path, photo_folder(tmp_path / "d"), make_model(PICTURE))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"lamina data card\n" + text.encode()
    for read in (lambda: LocalData(path, tmp_path / "s"), lambda: check(str(path), make_model(PICTURE))):
        with pytest.raises(DataError, match=r"the data card in .*out.npz is not a valid DataCard.*pack the file anew") as error:
            read()
        assert "\x1b" not in error.value.message


def test_packing_again_keeps_the_card_and_joins_the_scaling(tmp_path):
    model = make_model(PICTURE)
    first = packed(
        tmp_path,
        photo_folder(tmp_path / "d"),
        model,
        "a",
        convert=Settings(mean={"image": (0.5, 0.4, 0.3)}, std={"image": (0.5,)}),
    )
    again = fields(packed(tmp_path, first, model, "b"))
    assert again == fields(first)
    twice = packed(tmp_path, first, model, "c", convert=Settings(mean={"image": (1.0,)}, std={"image": (2.0,)}))
    assert (fields(twice)["image.mean"], fields(twice)["image.std"]) == ([1.0, 0.9, 0.8], [1.0, 1.0, 1.0])
    with pytest.raises(DataError, match="were packed with the class names cat, dog, --classes says dog, cat"):
        pack(str(first), model, tmp_path / "d.npz", Options(classes="dog,cat"))


def test_lists_that_are_too_long_are_hashes(tmp_path):
    assert classes_field(["a" * 90] * 91).startswith("sha256:") and classes_field(["a"] * (MAX_NAMES_BYTES // 2)) != "a"
    assert numbers_field([0.5] * 65).startswith("sha256:") and numbers_field([0.5] * 64) == (0.5,) * 64
    assert DataCard(classes=classes_field(["x" * 90 + str(i) for i in range(100)])).fields()["classes"].startswith("sha256:")


def command(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_a_device_that_lacks_a_class_packs_by_the_card_of_another(tmp_path):
    plan = write_plan(tmp_path / "plan.json", make_model(PICTURE))
    photos = photo_folder(tmp_path / "a")
    scaled = ("--mean", "0.5", "--std", "0.25", "--fit", "crop")
    assert command("pack", photos, "--for", plan, "--out", tmp_path / "a.npz", *scaled).exit_code == 0
    rows = (photos / "examples.csv").read_text().splitlines()
    (photos / "examples.csv").write_text("\n".join(row for row in rows if not row.endswith("cat")) + "\n")

    assert "--card OTHER.npz" in command("check", photos, "--for", plan).output
    shown = command("pack", photos, "--for", plan, "--out", tmp_path / "b.npz", "--card", tmp_path / "a.npz")
    assert shown.exit_code == 0, shown.output + str(shown.exception)
    assert fields(tmp_path / "b.npz") == fields(tmp_path / "a.npz")
    with np.load(tmp_path / "b.npz") as arrays:
        assert set(arrays["train_label"]) == {1}
    assert command("check", tmp_path / "b.npz", "--for", plan, "--card", tmp_path / "a.npz").output.endswith("no faults\n")
    shown = command("card", tmp_path / "a.npz", "--out", tmp_path / "card.json")
    assert "[cat, dog]" in shown.output and DataCard.from_file(tmp_path / "card.json") == read_card(tmp_path / "a.npz")


def test_two_files_that_differ_are_told_apart_with_both_values(tmp_path):
    plan = write_plan(tmp_path / "plan.json", make_model(PICTURE))
    for name, labels, options in (("a", ("Cat", "dog"), ()), ("b", ("cat", "Dog"), ("--fit", "crop"))):
        photos = photo_folder(tmp_path / name)
        text = (photos / "examples.csv").read_text().replace(",cat", f",{labels[0]}").replace(",dog", f",{labels[1]}")
        (photos / "examples.csv").write_text(text)
        assert command("pack", photos, "--for", plan, "--out", tmp_path / f"{name}.npz", *options).exit_code == 0
    shown = command("check", tmp_path / "b.npz", "--for", plan, "--card", tmp_path / "a.npz")
    assert shown.exit_code == 1
    assert (
        "class names [Cat, dog] in" in shown.output
        and "[Dog, cat] in this data; pack it again with --classes Cat,dog" in shown.output
    )
    assert "image: fit stretch in" in shown.output and "crop in this data; pack it again with --fit stretch" in shown.output
    shown = command(
        "pack", tmp_path / "b", "--for", plan, "--out", tmp_path / "c.npz", "--card", tmp_path / "a.npz", "--fit", "crop"
    )
    assert isinstance(shown.exception, DataError) and "fit stretch" in shown.exception.message
    assert not (tmp_path / "c.npz").exists()


def test_a_plan_has_a_card_that_packing_takes_over(tmp_path):
    model = make_model(PICTURE, classes=3)
    plan = Plan.from_file(write_plan(tmp_path / "plan.json", model))
    wanted = DataCard(classes=("owl", "dog", "cat"), modalities={"image": ModalityCard(mean=(0.5,))})
    (tmp_path / "plan.json").write_bytes(plan.model_copy(update={"data_card": wanted}).to_json())
    assert load_target(tmp_path / "plan.json").card == wanted
    photos = photo_folder(tmp_path / "d")
    assert command("pack", photos, "--for", tmp_path / "plan.json", "--out", tmp_path / "a.npz").exit_code == 0
    card = fields(tmp_path / "a.npz")
    assert card["classes"] == ["owl", "dog", "cat"] and card["image.mean"] == [0.5]
    for wrong, words in (
        (DataCard(classes=("a", "b")), "names 2 classes, the model has 3"),
        (DataCard(modalities={"audio": ModalityCard()}), "names 'audio'; the model has image"),
        (DataCard(modalities={"image": ModalityCard(shape=(1, 2))}), "has shape"),
    ):
        with pytest.raises(ConfigError, match=words):
            Plan.from_json(plan.model_copy(update={"data_card": wrong}).to_json())


def test_what_is_no_card_is_refused_by_the_option(tmp_path):
    plan = write_plan(tmp_path / "plan.json", make_model(MOTION))
    np.savez(tmp_path / "in.npz", motion=np.zeros((2, 2, 8)), label=[0, 1])
    for card, words in (
        ("none.npz", "does not exist"),
        ("in.npz", "has no data card"),
        ("plan.json", "is not a valid DataCard"),
    ):
        shown = command("check", tmp_path / "in.npz", "--for", plan, "--card", tmp_path / card)
        assert isinstance(shown.exception, ConfigError) and words in shown.exception.message


def test_a_stereo_file_of_another_rate_says_the_rate_it_was_brought_to(tmp_path):
    write_sound(tmp_path / "d" / "x.wav", rate=44100, channels=2)
    with wave.open(str(tmp_path / "d" / "x.wav")) as file:
        assert file.getframerate() == 44100
    write_table(tmp_path / "d", ("file", "label"), [("x.wav", 1)])
    assert fields(packed(tmp_path, tmp_path / "d", make_model(WAVEFORM)))["audio.rate"] == 16000


def test_values_that_were_scaled_twice_beyond_any_number_are_refused():
    assert joined(ModalityCard(mean=(0.0,), std=(4.0,)), ModalityCard(mean=(1.0,), std=(2.0,))).std == (8.0,)
    with pytest.raises(ConfigError, match=r"both scalings together go beyond .*: pack what they were made of again"):
        joined(ModalityCard(mean=(1e20,), std=(1.0,)), ModalityCard(mean=(0.0,), std=(1e20,)))


@pytest.mark.parametrize("field", ["rate", "window_ms", "hop_ms"])
def test_a_card_says_of_sounds_what_the_options_could(field):
    """A plan's card is what devices pack with: a window of 1e9 ms would take all of their memory."""
    with pytest.raises(ValueError, match="less than or equal to"):
        ModalityCard(**{field: 1_000_000})
