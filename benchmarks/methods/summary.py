"""Means over seeds, each method beside end-to-end training of the same objective in the same setting.

Differences are paired by seed: the same data, split and initial weights. Where end to end was run at several learning rates,
there are also differences to the best of them, chosen on the test scores: in its favour. Ratios are of means: 2.5 is 2.5 times
less than end to end. A bound has no costs of a device, so it has no ratios.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.methods.cells import MORE_ROUNDS, usual_setting
from benchmarks.methods.plans import baseline_of, rates_of
from benchmarks.methods.retrieval import CUTS, mean_recall

COSTS = ("planned_bytes", "macs_per_sample", "bytes_moved", "cpu_seconds")
NOTES = (
    "memory: weights, gradients, optimiser moments and activations of one batch, as planned at export, in the largest stage. "
    "FLOPs: multiply-accumulates of one sample in every local epoch of the run, trained parts 3 x forward (4 x where "
    "micro-batches are embedded first), copies of the model 1 x, both views where two are compared, and each frozen segment "
    "once for each stored version of the sample (benchmarks/methods/costs.py). Bytes: blobs and updates of one device over "
    "the run, programs included, heads included, without JSON messages. Memory and FLOPs do not depend on the machine. CPU: "
    "seconds of all devices over the run, features and evaluations included, the export not; rows may be of different days "
    "of a noisy machine. Shock: points that the model loses when a stage attaches its layers, before they train; drop: from "
    "the last round of a stage to the end of the first of the next. Both are means over the changes of stages. To best rate: "
    "points to end to end at that of its learning rates whose mean score is best, where it was run at several.",
)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each (data, setting, method), in the order in which they first appear; bounds with their data's own."""
    entries = []
    for data, setting in dict.fromkeys((row["data"], row["setting"]) for row in rows):
        here = [row for row in rows if (row["data"], row["setting"]) == (data, setting)]
        methods = dict.fromkeys(row["method"] for row in here)
        by_method = {method: [row for row in here if row["method"] == method] for method in methods}
        for method, mine in by_method.items():
            entries.append(_entry(mine, [by_method.get(rate, []) for rate in rates_of(baseline_of(method))]))
    return entries


def _entry(mine: Sequence[dict[str, Any]], rates: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """`rates` are the rows of end to end at its common rate, and then at others."""
    baseline, *others = rates
    scores = [row["score"] for row in mine]
    points = _points(mine, baseline)
    # A rate counts where it was run with every seed: with fewer, chance would choose it.
    seeds = {row["seed"] for row in baseline}
    swept = [rows for rows in others if seeds and {row["seed"] for row in rows} >= seeds]
    best = max([baseline, *swept], key=lambda rows: statistics.mean(row["score"] for row in rows)) if swept else []
    to_best = _points(mine, best)
    entry = {
        "data": mine[0]["data"],
        "setting": mine[0]["setting"],
        "method": mine[0]["method"],
        "score_is": mine[0]["score_is"],
        "seeds": [row["seed"] for row in mine],
        "score_mean": statistics.mean(scores),
        "score_sd": _mean_and_spread(scores)["sd"],
        "points_to_end_to_end": statistics.mean(points) if points else None,
        "points_range": [min(points), max(points)] if points else None,
        "best_rate": best[0]["method"] if best else None,
        "points_to_best_rate": statistics.mean(to_best) if to_best else None,
        "points_to_best_rate_range": [min(to_best), max(to_best)] if to_best else None,
    }
    if "image_to_text_r1" in mine[0]:
        entry["recall"] = {str(cut): _mean_and_spread([mean_recall(row, cut) for row in mine]) for cut in CUTS}
    for name, measure in (("shock_at_stage_start_points", stage_shock), ("drop_at_stage_change_points", stage_drop)):
        found = [points for row in mine if (points := measure(row)) is not None]
        entry[name] = statistics.mean(found) if found else None
    for cost in COSTS:
        means = [statistics.mean(row[cost] for row in rows) if rows and cost in rows[0] else None for rows in (mine, baseline)]
        entry[cost] = means[0]
        entry[f"{cost}_times_less"] = means[1] / means[0] if means[0] and means[1] else None
    return entry


def _points(mine: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[float]:
    """100 x the differences of the scores, for the seeds that both have."""
    by_seed = {row["seed"]: row["score"] for row in others}
    return [100 * (row["score"] - by_seed[row["seed"]]) for row in mine if row["seed"] in by_seed]


def _mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def stage_drop(row: dict[str, Any]) -> float | None:
    """By how many points the first round of a stage is below the last of the stage before, on average; None with one stage."""
    stages, scores = row.get("stage_by_round", []), row.get("accuracy_by_round", [])
    changes = [
        100 * (scores[at - 1] - scores[at])
        for at in range(1, len(stages))
        if stages[at] != stages[at - 1] and scores[at] is not None and scores[at - 1] is not None
    ]
    return statistics.mean(changes) if changes else None


def stage_shock(row: dict[str, Any]) -> float | None:
    """By how many points a model with a stage's new layers, not yet trained, is below the last round before, on average over
    the stages; None where that was not measured."""
    stages, scores = row.get("stage_by_round", []), row.get("accuracy_by_round", [])
    last_of = {stage: score for stage, score in zip(stages, scores, strict=True) if score is not None}
    shocks = []
    for start in row.get("stage_starts", ()):
        before = [score for stage, score in last_of.items() if stage < start["stage"]]
        shocks += [100 * (before[-1] - start["accuracy"])] if before else []
    return statistics.mean(shocks) if shocks else None


_LAYERWISE = ("layerwise", "lw", "lamina", "fll")
"""How the names of layer-wise methods begin."""


def bars(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Points to end to end of each kind of method, by data set in its usual setting, and their mean over the data sets: at its
    common learning rate, and at its best where it was run at several.

    `layerwise` and `progressive` are the plain methods. `layerwise_at_a_tenth` is the best layer-wise method with at most a
    tenth of the memory, the FLOPs and the bytes; `best_layerwise` the best of all layer-wise methods. These two are chosen by
    looking at the test scores, and runs of more rounds count too.
    """
    compared = [entry for entry in entries if entry["points_to_end_to_end"] is not None]
    usual = [entry for entry in compared if entry["setting"] == str(usual_setting(entry["data"]))]
    more = [entry for entry in compared if entry["setting"] == f"{usual_setting(entry['data'])}, {MORE_ROUNDS} rounds"]
    ours = [entry for entry in (*usual, *more) if entry["method"].startswith(_LAYERWISE)]
    found: dict[str, Any] = {}
    for kind, chosen in {
        "layerwise": _first_named(usual, ("layerwise", "lw_fedssl", "lw_fedsimclr")),
        "progressive": _first_named(usual, ("progressive", "prog_fedssl")),
        "layerwise_at_a_tenth": _best([entry for entry in ours if _is_a_tenth(entry)]),
        "best_layerwise": _best(ours),
    }.items():
        by_data = {
            each["data"]: {
                "setting": each["setting"],
                "method": each["method"],
                "points": each["points_to_end_to_end"],
                "points_to_best_rate": _to_best(each),
            }
            for each in chosen
        }
        means = {
            f"mean_{name}": statistics.mean(each[name] for each in by_data.values()) if by_data else None
            for name in ("points", "points_to_best_rate")
        }
        found[kind] = {"by_data": by_data, **means}
    return found


def _to_best(entry: dict[str, Any]) -> float:
    """Points to the best rate of end to end, where it has but one to that."""
    points: float = entry["points_to_end_to_end" if entry["best_rate"] is None else "points_to_best_rate"]
    return points


def _first_named(entries: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """For each data set the entry of the first of these methods that it has."""
    known = sorted((entry for entry in entries if entry["method"] in methods), key=lambda each: methods.index(each["method"]))
    return list({entry["data"]: entry for entry in reversed(known)}.values())


def _best(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each data set the entry with the most points."""
    return list({entry["data"]: entry for entry in sorted(entries, key=lambda each: each["points_to_end_to_end"])}.values())


def _is_a_tenth(entry: dict[str, Any]) -> bool:
    """Of the costs that do not depend on the machine."""
    return all((entry[f"{cost}_times_less"] or 0) >= 10 for cost in COSTS if cost != "cpu_seconds")


HEADINGS = (
    "data",
    "setting",
    "method",
    "seeds",
    "score",
    "sd",
    "points to e2e",
    "range",
    "to best rate",
    "shock",
    "drop",
    "memory",
    "FLOPs",
    "bytes",
    "CPU",
)


def table_of(entries: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="methods, federated in simulation")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right", no_wrap=heading == "method")
    last = None
    for entry in entries:
        here = (entry["data"], entry["setting"])
        if here != last and last is not None:
            table.add_section()
        table.add_row(*(here if here != last else ("", "")), *_cells(entry))
        last = here
    return table


def markdown_of(entries: Sequence[dict[str, Any]]) -> str:
    """The same table for a page."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    lines += [f"| {' | '.join((entry['data'], entry['setting'], *_cells(entry)))} |" for entry in entries]
    return "\n".join(lines) + "\n"


def recalls_of(entries: Sequence[dict[str, Any]]) -> str:
    """Recall at 1, 5 and 10 of the data that have it, both ways together: mean and standard deviation over seeds."""
    headings = ("data", "setting", "method", "seeds", *(f"R@{cut}" for cut in CUTS))
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for entry in (entry for entry in entries if "recall" in entry):
        found = [f"{each['mean']:.4f} ({_shown(each['sd'], '{:.4f}')})" for each in entry["recall"].values()]
        lines.append(f"| {' | '.join((entry['data'], entry['setting'], entry['method'], str(len(entry['seeds'])), *found))} |")
    return "\n".join(lines) + "\n"


def _cells(entry: dict[str, Any]) -> list[str]:
    """What follows data and setting."""
    return [
        entry["method"],
        str(len(entry["seeds"])),
        f"{entry['score_mean']:.4f}",
        _shown(entry["score_sd"], "{:.4f}"),
        _shown(entry["points_to_end_to_end"], "{:+.2f}"),
        "-" if entry["points_range"] is None else "{:+.1f} to {:+.1f}".format(*entry["points_range"]),
        _shown(entry["points_to_best_rate"], "{:+.2f}"),
        _shown(entry["shock_at_stage_start_points"], "{:+.2f}"),
        _shown(entry["drop_at_stage_change_points"], "{:+.2f}"),
        *(_shown(entry[f"{cost}_times_less"], "{:.2f}x less") for cost in COSTS),
    ]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
