"""Fine-tuning a real pretrained text encoder layer by layer, on real texts, over devices.

Question   What does layer-wise training make of MiniLM-L6's pretrained weights: against random weights, against end-to-end
           training of the same rounds, and against linear models that train no layer at all?
Method     `plans/minilm.toml` on emoji captions (`benchmarks.data.emoji`): 4 devices, Dirichlet(1) over the 8 classes, through
           the real exporter, coordinator and device processes. The test texts are dealt out evenly and evaluated by the
           devices after each round; the figure is that of the last. All runs of a seed have the same split and devices.
           The linear models see all training texts in one place, and their strength is chosen on a fifth of them.
Not shown  Training the embedding table: it is frozen in every run, end to end too. "Random weights" is the
           same plan, so its table and its lower three layers are random and stay so; its learning rate is not its own.
           With about 330 test texts, one standard error is about 2 points. The learning rates were chosen after trials of
           1e-4, 3e-4 and 1e-3 (a few rounds, eager torch) on texts held out of the training side, for the layer-wise plan
           under an earlier draw of the split: some of those are test texts now.
           Wall seconds are those of a shared machine; peak memory includes filling the feature cache and evaluation.

    python -m benchmarks.minilm [--seeds 0,1,2] [--rows NAME,NAME] [--engines NAME,NAME] [--fresh]

A run that stands in the results file already is not done again, unless --fresh is given.
"""

import argparse
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_torchvision import make_torchvision_importable
from benchmarks.data.emoji import Texts, load_emoji, split
from benchmarks.data.fetch import cache_folder
from benchmarks.data.minilm import PAD, load_minilm, load_tokenizer
from benchmarks.data.partition import dirichlet_rows, even_rows
from benchmarks.demo.federated import federated_run
from benchmarks.demo.report import device_row
from benchmarks.results_file import RESULTS, write_results
from export.plans.resolve import resolve
from lamina.bundles.keys import VARIABLE
from lamina.bundles.manifest import EngineName
from lamina.errors import DataError
from lamina.plans.plan import Plan
from lamina.plans.recipe import Recipe, read_recipe

RESULT, PLAN = "minilm", Path(__file__).parent / "plans" / "minilm.toml"
DEVICES, BETA = 4, 1.0
LAYERWISE, RANDOM, WHOLE = "pretrained, layer-wise", "random weights, layer-wise", "pretrained, end to end"
LINEAR, WORDS = "linear on pretrained features", "ridge on TF-IDF"
ROWS = (WORDS, LINEAR, LAYERWISE, RANDOM, WHOLE)
WHOLE_LEARNING_RATE = 3e-4
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def random_minilm() -> Any:
    """A BertModel of MiniLM's configuration with the library's random weights. A factory, as `load_minilm` is."""
    from transformers import BertModel

    return BertModel(load_minilm().config, add_pooling_layer=False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", default=",".join(row.replace(",", "") for row in ROWS), help="names without their commas")
    parser.add_argument("--engines", default="onnxruntime,executorch", help="dealt out over the devices in turn")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    engines = cast(list[EngineName], (options.engines.split(",") * DEVICES)[:DEVICES])
    make_torchvision_importable()
    os.environ.setdefault(VARIABLE, str(cache_folder() / "keys"))  # bundles of a benchmark are not signed with the user's key
    console = Console()
    rows: list[dict[str, Any]] = [] if options.fresh else known_rows()
    wanted = [row for row in ROWS if any(row.replace(",", "").startswith(name) for name in options.rows.split(","))]
    for seed in (int(seed) for seed in options.seeds.split(",")):
        for what in wanted:
            if any((row["what"], row["seed"]) == (what, seed) for row in rows):
                continue
            started = time.monotonic()
            train, test = split(load_emoji(), seed)
            is_linear = what in (LINEAR, WORDS)
            found = linear(what, train, test, seed) if is_linear else federated(what, train, test, seed, engines)
            rows.append({"what": what, "seed": seed, **found, "wall_seconds": time.monotonic() - started})
            console.print(f"seed {seed}, {what}: {found['test_accuracy']:.4f}", highlight=False)
            write_rows(rows)
    console.print(table_of(rows))
    console.print(f"written to {write_rows(rows)}")


def federated(what: str, train: Texts, test: Texts, seed: int, engines: Sequence[EngineName]) -> dict[str, Any]:
    """One run to its end, as the devices reported it."""
    plan = make_plan(what, seed)
    with TemporaryDirectory() as folder:
        files = deal_texts(train, test, text_tokens(), seed, Path(folder) / "data")
        manifest, status = federated_run(plan, files, engines, Path(folder))
    updates = [update for row in status.rounds for update in row.updates]
    return {
        "test_accuracy": status.rounds[-1].test_accuracy,
        "test_examples": status.rounds[-1].test_examples,
        "test_accuracy_by_round": [[row.stage, row.test_accuracy] for row in status.rounds],
        "devices": [device_row(f"device-{index}", updates) for index in range(DEVICES)],
        "active_parameters_max": max(stage.cost.active_parameters for stage in manifest.stages),
        "learning_rate": plan.stages[-1].learning_rate,
    }


def make_plan(what: str, seed: int) -> Plan:
    """The plan of the file, changed as little as the row asks."""
    changes: dict[str, Any] = {"seed": seed}
    if what == RANDOM:
        encoder = recipe().encoders["text"].model_dump(mode="json", exclude_unset=True)
        changes["encoders"] = {"text": encoder | {"factory": "benchmarks.minilm:random_minilm"}}
    if what == WHOLE:
        rounds = recipe().rounds
        assert not isinstance(rounds, int), rounds
        changes |= {"strategy": "end_to_end", "rounds": sum(rounds), "learning_rate": WHOLE_LEARNING_RATE}
    return resolve(str(PLAN), changes).plan


def recipe() -> Recipe:
    found = read_recipe(PLAN)
    assert isinstance(found, Recipe), PLAN
    return found


def text_tokens() -> int:
    return int(recipe().encoders["text"].options["tokens"])


def deal_texts(train: Texts, test: Texts, tokens: int, seed: int, folder: Path) -> list[Path]:
    """One .npz file for each device: training rows by Dirichlet over labels, test rows evenly.

    Raises DataError if the tokenizer's padding is not the model's: the model would read it as a word.
    """
    if (pad := load_minilm().config.pad_token_id) != PAD:
        raise DataError(f"the tokenizer pads with id {PAD}, the model's pad_token_id is {pad}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenize = load_tokenizer(tokens)
    files = []
    shares = zip(dirichlet_rows(train.label, DEVICES, BETA, seed), even_rows(len(test.label), DEVICES, seed), strict=True)
    for index, (mine, held_out) in enumerate(shares):
        part, rest = train.take(mine), test.take(held_out)
        arrays = {"train_text": tokenize(part.texts), "test_text": tokenize(rest.texts)}
        for ids in arrays.values():
            is_real = ids != PAD
            if not is_real[:, 0].all() or (np.diff(is_real.astype(np.int8), axis=1) > 0).any():
                raise DataError(f"a tokenized text has id {PAD} (padding) before a word; padding must come last")
        path = folder / f"device-{index}.npz"
        np.savez(path, **arrays, train_label=part.label, test_label=rest.label)
        files.append(path)
    return files


def linear(what: str, train: Texts, test: Texts, seed: int) -> dict[str, Any]:
    """A linear model on fixed features; the strength that is best on a fifth of the training texts, fitted again on all."""
    fit = logistic if what == LINEAR else ridge
    rest, held_out = split(train, seed)
    a, b = features(what, rest, held_out)
    tried = [float(np.mean(fit(a, rest.label, strength)(b) == held_out.label)) for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmax(tried))]
    a, b = features(what, train, test)
    is_right = fit(a, train.label, best)(b) == test.label
    return {"test_accuracy": float(is_right.mean()), "test_examples": len(is_right), "strength": best}


def features(what: str, train: Texts, test: Texts) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n, features) of both; whatever is fitted is fitted to the first."""
    if what == WORDS:
        return tf_idf(train, test)
    a, b = (pooled(part) for part in (train, test))
    mean = a.mean(axis=0)
    deviation = np.maximum(a.std(axis=0), 1e-6)  # two of MiniLM's 384 features are the same for every text
    return (a - mean) / deviation, (b - mean) / deviation


def pooled(texts: Texts) -> NDArray[np.float32]:
    """(n, 384): the pretrained model's last hidden states, mean over the tokens that are not padding."""
    ids = torch.from_numpy(load_tokenizer(text_tokens())(texts.texts))
    real = (ids != PAD).long()
    with torch.no_grad():
        hidden = load_minilm()(ids, attention_mask=real).last_hidden_state
    mean = (hidden * real.unsqueeze(-1)).sum(dim=1) / real.sum(dim=1, keepdim=True)
    return cast(NDArray[np.float32], mean.numpy())


def tf_idf(train: Texts, test: Texts) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(n, words of the training texts), rows of length 1; a word in few texts weighs more."""
    counted = [[Counter(re.findall(r"\w+", text.lower())) for text in part.texts] for part in (train, test)]
    column = {word: index for index, word in enumerate(sorted({word for counts in counted[0] for word in counts}))}
    tables = []
    for part in counted:
        table = np.zeros((len(part), len(column)), np.float32)
        for row, counts in enumerate(part):
            for word, count in counts.items():
                if word in column:
                    table[row, column[word]] = count
        tables.append(table)
    weight = np.log((1 + len(tables[0])) / (1 + (tables[0] > 0).sum(axis=0))) + 1
    weighed = [table * weight for table in tables]
    a, b = (table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12) for table in weighed)
    return a.astype(np.float32), b.astype(np.float32)


def ridge(x: NDArray[np.float32], label: NDArray[np.int64], strength: float) -> Any:
    """Least squares to +1 and -1 for each class; solved in the examples, of which there are fewer than words."""
    target = 2.0 * (label[:, None] == np.arange(label.max() + 1)) - 1
    weights = x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), target)
    return lambda other: (other @ weights).argmax(axis=1)


def logistic(x: NDArray[np.float32], label: NDArray[np.int64], strength: float) -> Any:
    """Softmax regression with an L2 penalty on the weights, to its optimum."""
    inputs, classes = torch.from_numpy(x), torch.from_numpy(label)
    weights = torch.zeros(x.shape[1], int(label.max()) + 1, requires_grad=True)
    bias = torch.zeros(weights.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weights, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weights + bias, classes) + strength * weights.square().sum()
        value.backward()
        return value

    search.step(loss)
    found, offset = weights.detach().numpy(), bias.detach().numpy()
    return lambda other: (other @ found + offset).argmax(axis=1)


def known_rows() -> list[dict[str, Any]]:
    path = RESULTS / f"{RESULT}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def write_rows(rows: list[dict[str, Any]]) -> Path:
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    facts = {"dirichlet_beta": BETA, "plan": f"benchmarks/plans/{PLAN.name}", "libraries": libraries}
    return write_results(RESULT, "make bench-minilm", rows, means=summary(rows), **facts)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of a row; memory is the largest of any device with that engine."""
    found = []
    for what in ROWS:
        mine = [row for row in rows if row["what"] == what]
        if not mine:
            continue
        devices = [device for row in mine for device in row.get("devices", ())]
        engines = dict.fromkeys(device["engine"] for device in devices)
        found.append(
            {
                "what": what,
                "seeds": [row["seed"] for row in mine],
                "test_accuracy_mean": statistics.mean(row["test_accuracy"] for row in mine),
                "wall_seconds_mean": statistics.mean(row["wall_seconds"] for row in mine),
                "peak_bytes_max": {
                    engine: max(device["peak_bytes"] for device in devices if device["engine"] == engine) for engine in engines
                },
                "bytes_down_per_device": statistics.mean(device["bytes_down"] for device in devices) if devices else 0,
                "bytes_up_per_device": statistics.mean(device["bytes_up"] for device in devices) if devices else 0,
            }
        )
    return found


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"MiniLM-L6 on emoji captions, {DEVICES} devices")
    for heading in ("what", "seeds", "test accuracy", "peak MiB", "MB down", "MB up", "seconds"):
        table.add_column(heading, justify="left" if heading in ("what", "peak MiB") else "right")
    for row in summary(rows):
        peaks = ", ".join(f"{engine} {peak / 2**20:.0f}" for engine, peak in row["peak_bytes_max"].items())
        table.add_row(
            row["what"],
            str(len(row["seeds"])),
            f"{row['test_accuracy_mean']:.4f}",
            peaks or "-",
            f"{row['bytes_down_per_device'] / 1e6:.0f}" if peaks else "-",
            f"{row['bytes_up_per_device'] / 1e6:.0f}" if peaks else "-",
            f"{row['wall_seconds_mean']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
