"""Packing streams, is atomic, gives back the same values, and is what the command line does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge_client.rows.local_data import LocalData
from lamina.bundles.manifest import Manifest, StageCost, StagePrograms
from lamina.cli.data import data as command
from lamina.data.models import load_model
from lamina.data.pack import Options, check, pack
from lamina.data.writer import Writer
from lamina.errors import ConfigError, DataError, DiskFullError
from lamina.plans.plan import Plan
from lamina.plans.strategies import make_stages
from tests.edge_client.tiny import MODEL, SEGMENTS, make_segment
from tests.lamina.trees import (
    MOTION,
    PICTURE,
    SOUND,
    TEXT,
    advance_tree,
    coco_tree,
    make_model,
    opened,
    photo_folder,
    values,
    write_image,
    write_table,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 40), st.floats(0.1, 0.6), st.integers(0, 5), st.booleans())
def test_what_was_packed_is_read_back_equal_and_in_order(tmp_path_factory, count, share, seed, is_compressed):
    folder, generator = tmp_path_factory.mktemp("p"), np.random.default_rng(seed)
    arrays = {
        "motion": generator.normal(size=(count, 2, 8)).astype(np.float32),
        "text": generator.integers(0, 300, (count, 6)),
        "label": np.arange(count) % 2,
    }
    (np.savez_compressed if is_compressed else np.savez)(folder / "in.npz", **arrays)
    model = make_model(MOTION, TEXT)

    report = pack(str(folder / "in.npz"), model, folder / "out.npz", Options(test_share=share, seed=seed))

    data = opened(folder / "out.npz", model, folder / "s")
    assert data.train_examples + data.test_examples == count
    assert report.examples == {"train": data.train_examples, "test": data.test_examples}
    place = {arrays["motion"][i].tobytes(): i for i in range(count)}
    for split in ("train", "test"):
        if data.examples(split):
            order = [place[row.tobytes()] for row in values(data, split, "motion")]
            assert order == sorted(order)
            for name in arrays:
                np.testing.assert_array_equal(values(data, split, name), arrays[name][order])
    assert not check(str(folder / "out.npz"), model).faults.total


def test_numpy_reads_the_file_and_the_same_source_gives_the_same_bytes(tmp_path):
    folder, model = photo_folder(tmp_path / "d"), make_model(PICTURE)
    for name in ("a", "b"):
        pack(str(folder), model, tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays) == ["test_image", "test_label", "train_image", "train_label"]
        assert arrays["train_image"].shape == (8, 3, 8, 12)


MEASURE = """
import sys
from pathlib import Path
import lamina.data.pack as packing
from lamina.data.models import load_model
from PIL import Image
import PIL.JpegImagePlugin

def peak_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

before = peak_kib()
packing.pack(sys.argv[1], load_model(Path(sys.argv[2])), Path(sys.argv[3]), packing.Options())
print(peak_kib() - before)
assert "torch" not in sys.modules
"""


def write_plan(path, model):
    stages = make_stages(model, "layerwise", rounds=2, learning_rate=0.1)
    path.write_bytes(Plan(name="p", model=model, strategy="layerwise", stages=stages).to_json())
    return path


def test_packing_2000_images_takes_few_mebibytes(tmp_path):
    """The file has 94 MiB, more than the bound; a fresh process, because the kernel's mark never falls."""
    big = PICTURE.model_copy(update={"input": PICTURE.input.model_copy(update={"height": 64, "width": 64})})
    model = make_model(big)
    for seed in range(8):
        write_image(tmp_path / "d" / f"{seed}.jpg", seed, size=(160, 120))
    for index in range(2000):
        (tmp_path / "d" / f"x{index}.jpg").hardlink_to(tmp_path / "d" / f"{index % 8}.jpg")
    write_table(tmp_path / "d", ("file", "label"), [(f"x{index}.jpg", index % 2) for index in range(2000)])
    plan = write_plan(tmp_path / "plan.json", model)

    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "d"), str(plan), str(tmp_path / "out.npz")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)

    assert (tmp_path / "out.npz").stat().st_size > 2000 * 3 * 64 * 64 * 4
    assert int(done.stdout) < 60 * 1024
    (tmp_path / "out.npz").unlink()


def test_a_killed_packing_leaves_no_file_and_the_next_one_clears_up(tmp_path):
    folder, model = photo_folder(tmp_path / "d"), make_model(PICTURE)
    plan, out = write_plan(tmp_path / "plan.json", model), tmp_path / "out.npz"
    script = (
        "import os, signal, sys; from pathlib import Path; import lamina.data.pack as p\n"
        "from lamina.data.models import load_model\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it is ignored where the tests run in the background
        "def kill(done, total):\n    if done == 6: os.kill(os.getpid(), int(sys.argv[4]))\n"
        "p.pack(sys.argv[1], load_model(Path(sys.argv[2])), Path(sys.argv[3]), on_progress=kill)"
    )
    for number in (signal.SIGKILL, signal.SIGINT):
        arguments = [sys.executable, "-c", script, str(folder), str(plan), str(out), str(int(number))]
        assert subprocess.run(arguments, capture_output=True).returncode
        assert not out.exists()
        assert (tmp_path / ".out.npz.partial").exists() == (number == signal.SIGKILL)

    pack(str(folder), model, out)
    opened(out, model, tmp_path / "s")
    assert not (tmp_path / ".out.npz.partial").exists()


def test_a_failure_keeps_the_file_that_was_there(tmp_path):
    folder, model, out = photo_folder(tmp_path / "d"), make_model(PICTURE), tmp_path / "out.npz"
    pack(str(folder), model, out)
    before = out.read_bytes()
    (folder / "photos" / "4.png").write_bytes(b"")
    with pytest.raises(DataError):
        pack(str(folder), model, out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "out.classes.txt", "out.npz"]


def test_two_processes_do_not_write_the_same_file(tmp_path):
    types, shapes = {"a": np.dtype(np.float32)}, {"a": (2,)}
    with (
        Writer(tmp_path / "out.npz", types, shapes),
        pytest.raises(ConfigError, match="another process is writing"),
        Writer(tmp_path / "out.npz", types, shapes),
    ):
        pass


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    folder, model = photo_folder(tmp_path / "d"), make_model(PICTURE)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space left"):
        pack(str(folder), model, tmp_path / "out.npz", Options(classes=names_file(tmp_path)))
    assert not (tmp_path / "out.npz").exists() and not (tmp_path / ".out.npz.partial").exists()


def names_file(folder):
    (folder / "names.txt").write_text("cat\ndog\n")
    return folder / "names.txt"


def test_nothing_good_is_no_data_set(tmp_path):
    folder = photo_folder(tmp_path / "d", 2)
    for file in (folder / "photos").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"has no good training example; the first fault: examples.csv line 2"):
        pack(str(folder), make_model(PICTURE), tmp_path / "out.npz", skip_bad=True)


def test_the_model_is_read_from_a_plan_or_a_bundle(tmp_path):
    plan = write_plan(tmp_path / "plan.json", make_model(PICTURE))
    assert load_model(plan) == make_model(PICTURE)
    with pytest.raises(ConfigError, match=r"is a folder without manifest\.json"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(tmp_path / "none.json")
    tiny_plan = Plan(name="t", model=MODEL, strategy="layerwise", stages=make_stages(MODEL, "layerwise", 3, 0.1))
    counts = ("active_parameters", "frozen_parameters", "flops_per_sample", "prefix_flops_per_sample", "frozen_bytes")
    moved = ("round_bytes_down", "round_bytes_up")
    cost = StageCost(**dict.fromkeys((*counts, *moved), 0), planned_bytes={}, program_bytes={})
    digest = "0" * 64
    manifest = Manifest(
        plan=tiny_plan,
        segments=tuple(make_segment(name) for name in SEGMENTS),
        initial_weights=dict.fromkeys(SEGMENTS, digest),
        programs={},
        frozen_programs={},
        stages=tuple(StagePrograms(index=stage.index, train={}, eval={}, cost=cost) for stage in tiny_plan.stages),
        blobs={digest: 1},
        versions={},
    )
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_bytes(manifest.to_json())
    assert load_model(tmp_path / "bundle") == load_model(tmp_path / "bundle" / "manifest.json") == MODEL


def run(*arguments, code=0):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if isinstance(result.exception, (ConfigError, DataError)):
        raise result.exception
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_the_command_packs_shows_and_checks(tmp_path):
    folder, plan, out = photo_folder(tmp_path / "d"), write_plan(tmp_path / "p.json", make_model(PICTURE)), tmp_path / "o.npz"

    shown = run("pack", folder, "--for", plan, "--out", out, "--mean", "0.5,0.4,0.3", "--std", "image=0.2", "--fit", "crop")
    assert "8 train, 2 test" in shown and "3 x 8 x 12" in shown and "1 dog" in shown
    assert f"class names: {tmp_path / 'o.classes.txt'}" in shown
    assert run("check", out, "--for", plan).endswith("no faults\n")

    with pytest.raises(ConfigError, match="exists; pass --overwrite"):
        run("pack", folder, "--for", plan, "--out", out)
    (folder / "photos" / "4.png").write_bytes(b"")
    shown = run("check", folder, "--for", plan, code=1)
    assert "fault    examples.csv line 6 (photos/4.png): image 4.png: the file has 0 bytes" in shown
    shown = run("pack", folder, "--for", plan, "--out", out, "--overwrite", "--skip-bad", "--all-train")
    assert "left out: 1 of 10 examples" in shown
    assert LocalData(out, tmp_path / "s").train_examples == 9


def test_the_command_takes_every_source(tmp_path):
    pair = write_plan(tmp_path / "pair.json", make_model(PICTURE, TEXT, classes=0))
    both = write_plan(tmp_path / "both.json", make_model(PICTURE, SOUND))
    motion = write_plan(tmp_path / "motion.json", make_model(MOTION))
    coco = coco_tree(tmp_path / "coco")
    np.savez(tmp_path / "in.npz", windows=np.random.default_rng(0).normal(size=(9, 2, 8)), label=np.arange(9) % 2)
    captions = ("--captions", "annotations/captions_train2017.json", "--images", "train2017", "--caption", "all")

    run("pack", coco, "--for", pair, "--out", tmp_path / "a.npz", *captions, "--test-share", "0.5", "--seed", "3")
    run("pack", advance_tree(tmp_path / "d"), "--for", both, "--out", tmp_path / "b.npz", "--rate", "8000", "--hop-ms", "5")
    run("pack", tmp_path / "in.npz", "--for", motion, "--out", tmp_path / "c.npz", "--rename", "motion=windows")

    sizes = [LocalData(tmp_path / f"{name}.npz", tmp_path / name).test_examples for name in "abc"]
    assert sizes == [9, 2, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--all-train", "--test-share", "0.1"), "exclude each other"),
        (("--test-share", "1.5"), "--test-share 1.5 is outside"),
        (("--kind", "zip"), "--kind is one of folder, arrays, class, coco, advance, given 'zip'"),
        (("--fit", "zoom"), "--fit is one of stretch, crop"),
        (("--rename", "image"), "not of the form MODALITY=NAME"),
        (("--rename", "sound=a"), "--rename names 'sound'; the model has image"),
        (("--mean", "a,b"), "not of the form"),
        (("--mean", "sound=1"), "--mean names 'sound'; the model has image"),
        (("--std", "0"), "--std of image must be above 0"),
        (("--mean", "1,2"), "takes 1 or 3 numbers, given 2"),
        (("--mean", "nan"), r"--mean of image takes numbers within \+-1e\+38, given nan"),
        (("--mean", "0,1e39,0"), r"within \+-1e\+38, given 1e\+39"),
        (("--std", "inf"), r"--std of image takes numbers within \+-1e\+38, given inf"),
        (("--classes", "none.txt"), "none.txt does not exist"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_read(tmp_path, options, words):
    plan = write_plan(tmp_path / "p.json", make_model(PICTURE))
    with pytest.raises(ConfigError, match=words):
        run("check", photo_folder(tmp_path / "d", 2), "--for", plan, *options)
    assert Path(plan).exists()
