"""Every published figure beside what the cost report gives for the same model and schedule.

`source` tells how firm a figure is: `paper` is printed there or recorded by the authors' code; `derived` was worked out by hand
from the authors' configuration or formulas, and agrees with the paper's rounder figure where there is one (Federated Layer-wise
Learning: 8 to 39 % of the FLOPs, 8 to 54 % of the traffic, 29 % with depth dropout).
"""

from dataclasses import dataclass
from typing import Literal

from benchmarks.published import depth_dropout, lw_fedmml_coco, lw_fedssl
from lamina.figures.cost_report import CostReport

_MIB = 2**20


@dataclass(frozen=True)
class Check:
    """One figure. `published` is kept as it was printed, because its digits tell how exact it is."""

    method: str
    quantity: str
    published: str
    source: Literal["paper", "derived"]
    counted: float

    @property
    def digits(self) -> int:
        return len(self.published.partition(".")[2])

    @property
    def shown(self) -> str:
        """What was counted, with the digits of the published figure."""
        return f"{self.counted:.{self.digits}f}"

    @property
    def deviation(self) -> float:
        """Fraction by which the count differs from the published figure."""
        return self.counted / float(self.published) - 1


def all_checks() -> list[Check]:
    """Takes a few seconds, nearly all of them to import `transformers`."""
    return [*_fedmml(), *_fedssl(), *_depth_dropout()]


def _fedmml() -> list[Check]:
    name = "LW-FedMML, COCO"
    skewed = lw_fedmml_coco.report("layerwise", lw_fedmml_coco.SKEWED)
    uniform = lw_fedmml_coco.report("layerwise", lw_fedmml_coco.UNIFORM)
    whole = skewed.end_to_end.with_heads
    sizes = ("273.5", "303.9", "334.3", "364.8", "395.2", "425.6")
    flops = ("1.67", "2.11", "2.60", "3.09", "3.58", "4.07")
    checks = [
        Check(name, f"model in stage {s.index + 1}, MiB", printed, "derived", s.with_heads.model_bytes / _MIB)
        for s, printed in zip(skewed.stages, sizes, strict=True)
    ]
    last = skewed.stages[-1].with_heads
    checks.append(Check(name, "model in stage 6, MiB", "425.63", "paper", last.model_bytes / _MIB))
    checks += [
        Check(name, f"exchange one way in stage {s.index + 1}, MiB", "181.7", "derived", s.with_heads.round_bytes_up / _MIB)
        for s in skewed.stages[1:]
    ]
    checks += [
        Check(name, f"FLOPs per sample in stage {s.index + 1}, G", printed, "derived", s.with_heads.flops_per_sample / 1e9)
        for s, printed in zip(skewed.stages, flops, strict=True)
    ]
    checks += [
        Check("FedMML, COCO", "FLOPs per sample, G", "9.02", "derived", whole.flops_per_sample / 1e9),
        Check("FedMML, COCO", "traffic of 90 rounds, GB", "76.6", "derived", _paper_gb(skewed, is_whole=True)),
        Check(name, "traffic of 90 rounds, skewed, GB", "32.7", "derived", _paper_gb(skewed)),
        Check(name, "traffic of 90 rounds, uniform, GB", "35.5", "derived", _paper_gb(uniform)),
    ]
    for label, report, communication, compute in (
        ("skewed", skewed, "2.3", "2.4"),
        ("skewed", skewed, "2.34", "2.38"),
        ("uniform", uniform, "2.16", "3.16"),
    ):
        source: Literal["paper", "derived"] = "paper" if len(communication) == 3 else "derived"
        saved = report.with_heads.savings
        checks += [
            Check(name, f"traffic, {label}, times less", communication, source, saved.communication or 0),
            Check(name, f"FLOPs, {label}, times less", compute, source, saved.flops or 0),
        ]
    checks.append(
        Check(name, "FLOPs of cached steps, times less", "5.7", "derived", skewed.with_heads.savings.flops_cached_steps or 0)
    )
    for label, rounds, communication, compute in (
        ("skewed", lw_fedmml_coco.SKEWED, "1.04", "1.10"),
        ("uniform", lw_fedmml_coco.UNIFORM, "1.22", "1.69"),
    ):
        saved = lw_fedmml_coco.report("progressive", rounds).with_heads.savings
        checks += [
            Check("Prog-FedMML, COCO", f"traffic, {label}, times less", communication, "derived", saved.communication or 0),
            Check("Prog-FedMML, COCO", f"FLOPs, {label}, times less", compute, "derived", saved.flops or 0),
        ]
    return checks


def _fedssl() -> list[Check]:
    saved = lw_fedssl.report("layerwise").with_heads.savings
    return [
        Check("LW-FedSSL, MoCoV3", "traffic, times less", "5.07", "paper", saved.communication or 0),
        Check("LW-FedSSL, MoCoV3", "FLOPs, times less", "4.20", "paper", saved.flops or 0),
    ]


def _depth_dropout() -> list[Check]:
    """Shares of end-to-end training, in percent of one round."""
    resident = depth_dropout.report("resident")
    downloaded = depth_dropout.report("downloaded")
    dropped = depth_dropout.report("downloaded", layer_budget=6)
    checks = []
    for label, report, phase, traffic, compute in (
        ("phase 1", downloaded, 1, "8.3", "8.3"),
        ("phase 12, prefix kept", resident, 12, "8.3", "38.9"),
        ("phase 12, prefix downloaded", downloaded, 12, "54.2", "38.9"),
        ("phase 12, 6 of 12 layers", dropped, 12, "29.2", "22.2"),
    ):
        step, whole = report.stages[phase - 1].with_heads, report.end_to_end.with_heads
        name = "FLL, depth dropout" if report is dropped else "FLL"
        checks += [
            Check(name, f"traffic, {label}, %", traffic, "derived", 100 * step.round_bytes / whole.round_bytes),
            Check(name, f"FLOPs, {label}, %", compute, "derived", 100 * step.flops_per_sample / whole.flops_per_sample),
        ]
    return checks


def _paper_gb(report: CostReport, *, is_whole: bool = False) -> float:
    """The papers divide a sum of MiB by 1000 and call it GB."""
    run = report.with_heads.end_to_end if is_whole else report.with_heads.plan
    return run.bytes_moved / _MIB / 1000
