"""Do the engines compute what PyTorch computes, for a model of every library that lamina knows?

Question   The largest error of any program against eager PyTorch, for each adapter and engine; and that of the rewrites.
Method     Small models of the libraries' own classes (`benchmarks.library_models`), layer-wise. Every program that the stages
           need (training, evaluation, frozen segments; for the contrastive pair: embed, loss, backward) is lowered afresh and
           run by its own runtime, with one sample and with two, on perturbed weights and random inputs, beside eager autograd
           (`export.lowering.parity`). An error is the largest difference of an output, as a fraction of the output's largest
           value where that is above 1. A rewrite is compared with the original on features that flow through the model.
Not shown  Models of other sizes, and what hundreds of steps make of the errors.

    python -m benchmarks.fidelity [--model NAME ...] [--engine NAME ...] [--fresh]

Each row is written when it is done. The next run keeps the rows that hold, if all versions are the same, and measures the
others; `--fresh` measures all, which a change of lamina's own code asks for. The exit status is 1 if a program is off by more
than 1e-5, or a model cannot be exported.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results_file
from benchmarks.demo.report import versions
from benchmarks.library_models import CONTRASTIVE, FACTORIES
from export.graphs.cut import cut_stage, find_pools, find_segments
from export.lowering import lower_executorch, lower_onnx, lower_torch
from export.lowering.parity import TOLERANCE
from export.lowering.worker import lowering_pool
from export.models.proofs import prove_model
from export.plans.resolve import Resolved, resolve
from export.programs import ProgramSet
from lamina.bundles.manifest import ENGINES, EngineName
from lamina.errors import LaminaError

NAME = "fidelity"
COMMAND = "make bench-fidelity"
LIBRARIES = ("timm", "transformers", "torchvision", "onnxscript")
DEFAULT_ENGINES: tuple[EngineName, ...] = ("onnxruntime", "executorch")
MODELS = {factory.__name__: factory for factory in FACTORIES}
Row = dict[str, Any]


def measure(model: str, engine: EngineName) -> Row:
    """One row. A model that cannot be exported, or a program that is off, is a row with an `error`."""
    row: Row = {"model": model, "is": _is(model), "engine": engine}
    begin = time.perf_counter()
    try:
        row |= measure_programs(_resolve(model), engine)
    except LaminaError as error:
        row |= {"error": f"{type(error).__name__}: {error.message}"}
    return row | {"seconds": time.perf_counter() - begin}


def _is(model: str) -> str:
    return (MODELS[model].__doc__ or "").strip()


def measure_programs(resolved: Resolved, engine: EngineName) -> Row:
    """Lowers and checks every program of a plan: how many by role, their bytes and errors.

    Raises ParityError for a program that is off, ExportError for one that cannot be lowered, and CutError.
    """
    plan, model = resolved.plan, resolved.model.eval()
    segments, pools = find_segments(model, plan.model), find_pools(model, plan.model)
    with lowering_pool(1) as start:
        programs = ProgramSet(plan, {engine: {}}, None, start)  # no cache: every program is lowered and checked now
        for stage in plan.stages:
            programs.add_stage(stage, cut_stage(segments, plan.model, stage, pools=pools, until_embeddings=plan.embeds_first))
        for name in dict.fromkeys(name for stage in plan.stages for name in stage.frozen):
            programs.add_frozen(name, segments[name])
        if plan.embeds_first:
            programs.add_loss()
        programs.finish(lambda done, total: None)
    roles = {key: wanted.role for key, wanted in programs.wanted.items()}
    rewrites = [*resolved.rewrites, *prove_model(segments, pools, plan.model)]
    found: Row = {
        "programs": dict(Counter(roles.values())),
        "program_bytes": sum(len(lowered.data) for lowered in programs.lowered.values()),
        "largest_rewrite_difference": max((each.largest_difference for each in rewrites), default=None),
    }
    if unchecked := set(roles) - set(programs.errors):
        return found | {
            "error": f"{len(unchecked)} of {len(roles)} programs were not run: the runtime of {engine} is not installed"
        }
    by_role = {role: max(programs.errors[key] for key in roles if roles[key] == role) for role in found["programs"]}
    return found | {"largest_error": max(by_role.values()), "largest_error_by_role": by_role}


def holds(row: Row) -> bool:
    """Whether all programs of the row were checked and are within the tolerance."""
    return "error" not in row and row["largest_error"] <= TOLERANCE


def kept_rows(facts: dict[str, Any]) -> list[Row]:
    """The rows of the results file that hold, if it was measured with these versions and facts; else none."""
    path = results_file.RESULTS / f"{NAME}.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["versions"] != versions() or any(content.get(key) != value for key, value in facts.items()):
        return []
    return [row | {"is": _is(row["model"])} for row in content["rows"] if holds(row) and row["model"] in MODELS]


def run(models: Sequence[str], engines: Sequence[EngineName], is_fresh: bool, console: Console) -> list[Row]:
    """The rows of these models and engines, measured or kept. The file is written after each, with what else it had."""
    facts = {"tolerance": TOLERANCE, "libraries": libraries(), "formats": formats()}
    rows = {(row["model"], row["engine"]): row for row in kept_rows(facts)}
    wanted = [(model, engine) for model in models for engine in engines]
    for model, engine in wanted:
        if (model, engine) in rows and not is_fresh:
            console.print(f"{model}, {engine}: kept", highlight=False)
            continue
        console.print(f"{model}, {engine}: lowering and checking (up to minutes)", highlight=False)
        row = rows[model, engine] = measure(model, engine)
        console.print(f"  {_summary(row)}, {row['seconds']:.0f} s", highlight=False, markup=False)
        ordered = sorted(rows.values(), key=lambda row: (list(MODELS).index(row["model"]), ENGINES.index(row["engine"])))
        results_file.write_results(NAME, COMMAND, ordered, **facts)
    return [rows[key] for key in wanted]


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(title=f"largest error against eager PyTorch (bound: {TOLERANCE:g})")
    for heading in ("model", "engine", "programs", "error", "rewrites", "seconds", "MB"):
        table.add_column(heading, justify="left" if heading in ("model", "engine", "programs") else "right")
    for row in rows:
        rewrites, size = row.get("largest_rewrite_difference"), row.get("program_bytes")
        table.add_row(
            row["is"],
            row["engine"],
            ", ".join(f"{count} {role}" for role, count in row.get("programs", {}).items()),
            f"{row['largest_error']:.1e}" if "largest_error" in row else "failed",
            "" if rewrites is None else f"{rewrites:.1e}",
            f"{row['seconds']:.0f}",
            "" if size is None else f"{size / 1e6:.2f}",
        )
    return table


def libraries() -> dict[str, str]:
    """Versions of the libraries whose models are measured, and of the one that writes ONNX programs."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def formats() -> dict[str, int]:
    """What changes with our own lowering, as in the keys of the program cache."""
    return {"executorch": lower_executorch.FORMAT, "onnxruntime": lower_onnx.FORMAT, "torch": lower_torch.FORMAT}


def _resolve(model: str) -> Resolved:
    is_pair = model in CONTRASTIVE
    factory = MODELS[model]
    changes = {
        "classes": None if is_pair else 3,
        "training": {"batch_size": 4, "micro_batch": 2 if is_pair else None},
    }
    return resolve(f"{factory.__module__}:{factory.__qualname__}", changes)


def _summary(row: Row) -> str:
    return row["error"] if "error" in row else f"{sum(row['programs'].values())} programs, error {row['largest_error']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(DEFAULT_ENGINES))
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    rows = run(arguments.model, arguments.engine, arguments.fresh, console)
    console.print(table_of(rows))
    failed = [row for row in rows if not holds(row)]
    for row in failed:
        console.print(f"{row['model']}, {row['engine']}: {_summary(row)}", highlight=False, markup=False)
    errors = [row["largest_error"] for row in rows if "largest_error" in row]
    console.print(
        f"largest error of all: {max(errors):.1e}" if errors else "nothing was measured",
        f"({len(rows) - len(failed)} of {len(rows)} rows within {TOLERANCE:g})",
        highlight=False,
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
