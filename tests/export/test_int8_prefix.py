"""int8 frozen layers: what the programs take, that they hold one float32 matrix at a time, and the reported error."""

from hashlib import sha256

import numpy as np
import pytest
import torch
from torch import nn

from export.cost.counts import peak_live_bytes
from export.graphs.frozen import frozen_graph, restore, take
from export.inputs import example_inputs, raw_input
from export.lowering.prefix_errors import ROWS, frozen_chains, measure_prefix, read_sample
from lamina.encoding.quantize import dequantize_rows, quantize_rows
from lamina.errors import DataError
from lamina.plans.model import TextTokens
from tests.export.tiny import (
    AUDIO,
    BATCH,
    COEFFICIENTS,
    ONE,
    SHALLOW,
    TOKENS,
    WIDTH,
    describe,
    export_tiny,
    model_of,
    one_stage,
    plan_of,
)

PLAN = plan_of(SHALLOW, prefix_precision="int8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    random = np.random.default_rng(3)
    arrays = {
        f"train_{e.modality}": random.normal(size=(ROWS + 9, *e.input.shape)).astype(np.float32) for e in SHALLOW.encoders
    }
    path = tmp_path_factory.mktemp("data") / "sample.npz"
    np.savez(path, train_label=np.zeros(ROWS + 9, np.int64), **arrays)
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, cache, sample):
    return export_tiny(tmp_path_factory.mktemp("int8") / "bundle", cache, plan=PLAN, sample=sample)


def test_layers_are_int8_and_stems_are_not(manifest):
    frozen = {name: manifest.programs[digest] for name, digest in manifest.frozen_programs["torch"].items()}
    assert {name: program.precision for name, program in frozen.items()} == {
        name: "int8" if ".layers." in name else "fp32" for name in PLAN.stages[-1].frozen
    }
    layers = {program.blob for name, program in frozen.items() if ".layers." in name}
    assert len(layers) == 1  # equal layers of both modalities and all depths are one program
    shapes = tuple(tuple(p.shape) for p in model_of(SHALLOW).segments()["audio.layers.0"].parameters())
    assert manifest.programs[layers.pop()].weights == shapes  # those of the float32 weights


def test_training_programs_and_their_cost_do_not_know_of_the_prefix(tmp_path, cache, manifest):
    exact = export_tiny(tmp_path / "fp32", cache, plan=plan_of(SHALLOW))
    assert [(stage.train, stage.eval) for stage in exact.stages] == [(stage.train, stage.eval) for stage in manifest.stages]
    assert (exact.prefix_errors, exact.prefix_errors_on) == ({}, "")


def test_weights_as_taken_stand_for_the_rounded_ones():
    weights = (torch.randn(3, 5), torch.randn(3), torch.randn(1, 2, 4))
    taken = take(weights, "int8")
    assert [(tuple(value.shape), value.dtype) for value in taken] == [
        ((3, 5), torch.int8),
        ((3,), torch.float32),
        ((3,), torch.float32),
        ((1, 2, 4), torch.float32),
    ]
    matrix, *others = restore(taken, [weight.ndim for weight in weights])
    np.testing.assert_array_equal(matrix.numpy(), dequantize_rows(*quantize_rows(weights[0].numpy())))
    assert all(torch.equal(a, b) for a, b in zip(others, weights[1:], strict=True))
    assert all(a is b or torch.equal(a, b) for a, b in zip(take(weights, "fp32"), weights, strict=True))


def test_one_dequantised_matrix_is_alive_at_a_time():
    width = 64

    def peak(depth):
        layer = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        return peak_live_bytes(frozen_graph(layer, (torch.randn(2, width),), BATCH, "int8"), 1)

    # While it is scaled, a matrix exists twice; beside it there are a layer's input and the row scales, which are a view.
    assert peak(2) == peak(5) == 4 * (2 * width * width + width)


def test_errors_are_those_of_the_whole_chain_on_the_sample(manifest, sample):
    assert manifest.prefix_errors_on == sha256(sample.read_bytes()).hexdigest()
    segments = model_of(SHALLOW).segments()
    expected = {}
    for modality, chain in frozen_chains(PLAN).items():
        exact = rounded = torch.from_numpy(np.load(sample)[f"train_{modality}"][:ROWS])
        for name in chain:
            with torch.no_grad():
                exact = segments[name](exact)
                if ".layers." in name:
                    axes = [p.ndim for p in segments[name].parameters()]
                    values = restore(take(tuple(p.detach() for p in segments[name].parameters()), "int8"), axes)
                    names = [key for key, _ in segments[name].named_parameters()]
                    rounded = torch.func.functional_call(segments[name], dict(zip(names, values, strict=True)), (rounded,))
                else:
                    rounded = segments[name](rounded)
            expected[name] = float((rounded - exact).norm() / exact.norm())
    assert manifest.prefix_errors["torch"] == pytest.approx(expected, abs=2e-6)
    assert len(expected) == 2 * 2  # of each modality the stem, and all layers but the last
    assert 0 < max(expected.values()) < 1e-2


def test_random_inputs_stand_in_for_a_sample_and_the_bundle_stays_the_same(tmp_path, cache):
    plan = plan_of(describe(AUDIO.model_copy(update={"layers": 2})), prefix_precision="int8")
    one, other = (export_tiny(tmp_path / name, cache, plan=plan) for name in ("a", "b"))
    assert one == other
    assert one.prefix_errors_on == "random inputs"
    assert 0 < one.prefix_errors["torch"]["audio.layers.0"] < 1e-2


def test_an_engine_that_cannot_run_here_reports_no_error(monkeypatch):
    monkeypatch.setattr("export.lowering.prefix_errors.is_installed", lambda engine: False)
    assert measure_prefix(PLAN, {}, "torch", {}, {}) == {}


def test_without_a_frozen_layer_there_is_nothing_to_measure(tmp_path, cache):
    manifest = export_tiny(tmp_path / "b", cache, plan=one_stage(PLAN), sample=tmp_path / "is not read")
    assert (manifest.prefix_errors, manifest.prefix_errors_on) == ({}, "")


def good():
    return {"train_audio": np.zeros((3, TOKENS, COEFFICIENTS), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"test_audio": good()["train_audio"]}, r"has no array train_audio; it has \['test_audio'\]"),
        ({"train_audio": np.zeros((3, TOKENS), np.float32)}, r"array train_audio has 3 rows of shape \(4,\)"),
        ({"train_audio": good()["train_audio"].astype(np.float64)}, "dtype float64"),
        ({"train_audio": good()["train_audio"][:0]}, "has 0 rows"),
        ({"train_audio": np.float32(1)}, r"rows of shape \(\)"),
        ({"train_audio": good()["train_audio"] + np.float32(np.nan)}, "holds NaN"),
    ],
)
def test_a_sample_that_the_model_cannot_take_is_refused_by_name(tmp_path, arrays, words):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=words):
        read_sample(tmp_path / "s.npz", plan_of(ONE))


def test_a_sample_must_be_an_npz_file(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros(3))
    for name in ("s.npy", "none.npz"):
        with pytest.raises(DataError, match=r"is no \.npz file"):
            read_sample(tmp_path / name, plan_of(ONE))


def test_token_ids_of_a_sample_must_be_in_the_vocabulary(tmp_path):
    text = AUDIO.model_copy(update={"modality": "text", "input": TextTokens(vocabulary=7, length=TOKENS)})
    np.savez(tmp_path / "s.npz", train_text=np.full((2, TOKENS), 7))
    with pytest.raises(DataError, match=r"train_text has token ids outside of \[0, 7\)"):
        read_sample(tmp_path / "s.npz", plan_of(describe(text)))


def test_an_int8_graph_is_one_graph_for_all_batches():
    layer = model_of().segments()["audio.layers.0"]
    weights = take(tuple(p.detach() for p in layer.parameters()), "int8")
    for max_batch in (1, BATCH):
        run = frozen_graph(layer, (torch.randn(min(2, max_batch), TOKENS, WIDTH),), max_batch, "int8").module()
        for batch in {1, max_batch}:
            x = torch.randn(batch, TOKENS, WIDTH)
            torch.testing.assert_close(run(weights, (x,)), layer(x), atol=0.02, rtol=0.02)


def test_stems_take_what_they_always_took(tmp_path, cache, manifest):
    (spec,) = {manifest.programs[d].inputs for n, d in manifest.frozen_programs["torch"].items() if n == "audio.stem"}
    encoder = SHALLOW.encoder("audio")
    assert spec[0].shape == raw_input(encoder).shape
    assert example_inputs(SHALLOW, (raw_input(encoder),), 1)[0].shape == (1, *spec[0].shape)
