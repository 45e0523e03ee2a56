"""What training a stage on a device will take, predicted from graphs alone: nothing is lowered and nothing is run.

    peak = base + weights + slope * live + offset (+ a little for each loaded program)

`base` is a fresh training process with its engine loaded, measured where it is asked; `weights` are parameters, gradient
and optimiser moments; `live` is the peak of tensors alive in the graph at the micro-batch (`export.cost.counts`). The engine's
constants stand for what its allocator and its packed copies add; they were fitted to measured peaks of single blocks
(`benchmarks.fit_predictions`, which also shows how far the predictions are off).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, get_args

from torch import nn
from torch.export import ExportedProgram

from export.cost.counts import embedding_bytes, held_values, peak_live_bytes, planned_bytes
from export.graphs.cut import cut_stage, find_pools, find_segments
from export.lowering.worker import LoweredProgram
from export.models import parameters
from export.models.models import build_model
from export.models.parameters import fixed_segments
from export.programs import ProgramSet, stage_terms
from lamina.bundles.manifest import EngineName, Precision, Role
from lamina.plans.plan import OptimizerSettings, Plan, Stage
from lamina.plans.strategies import freeze_fixed

MIB = 1 << 20
_ANY: EngineName = "onnxruntime"  # an engine whose files hold the joint graphs themselves


class Overhead(NamedTuple):
    """What an engine takes beyond the live tensors of its graphs; all programs resident, or one arena for all."""

    slope: float
    offset_bytes: int
    program_bytes: int
    """For each program that is loaded."""
    shares_arena: bool


OVERHEADS: dict[EngineName, Overhead] = {
    "executorch": Overhead(1.60, 3 * MIB, 2 * MIB, False),
    "onnxruntime": Overhead(1.30, 3 * MIB, 6 * MIB, True),
    "torch": Overhead(1.30, 112 * MIB, 2 * MIB, True),
}


@dataclass(frozen=True)
class StageNeeds:
    """The graphs of one stage, with the batch as a symbol: they answer for every micro-batch."""

    stage: Stage
    parameters: int
    batch_size: int
    graphs: dict[Role, ExportedProgram]
    frozen: dict[Precision, tuple[tuple[ExportedProgram, int], ...]]
    """Graph and bytes of weights of each different frozen segment."""
    embedding_bytes: int
    held_values: int
    """Numbers of the references, of the frozen tensors and, with the proximal term, of the weights that the round started
    with."""

    def train_bytes(self, engine: EngineName, micro_batch: int, optimizer: OptimizerSettings, base_bytes: int) -> int:
        """Predicted peak of the training process."""
        slope, offset, program, shares = OVERHEADS[engine]
        live = [
            peak_live_bytes(graph, self.batch_size if role == "loss" else micro_batch) for role, graph in self.graphs.items()
        ]
        weights = planned_bytes(self.parameters, optimizer, 0, self.held_values)
        fixed = base_bytes + weights + 2 * self.embedding_bytes + offset + program * len(live)
        return int(fixed + slope * (max(live) if shares else sum(live)))

    def fill_bytes(self, engine: EngineName, micro_batch: int, precision: Precision, base_bytes: int) -> int:
        """Predicted peak while the features of the frozen prefix are made: one segment, one chunk."""
        slope, offset, program, _ = OVERHEADS[engine]
        each = [int(weights + slope * peak_live_bytes(graph, micro_batch)) for graph, weights in self.frozen[precision]]
        return base_bytes + offset + program + max(each) if each else 0


def stage_needs(
    plan: Plan, micro_batch: int | None = None, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[StageNeeds]:
    """The needs of each different stage of a plan; stages of equal layers are traced, and listed, once. With a contrastive
    objective, those of devices with one modality are listed beside it.

    With a contrastive objective, `micro_batch` decides whether the step is one program or three (`lamina.bundles.manifest`).
    """
    training = plan.training.model_copy(update={"micro_batch": micro_batch})
    plan = plan.model_copy(update={"training": training})
    model = build_model(plan.model, plan.seed)
    segments, pools = find_segments(model, plan.model), find_pools(model, plan.model)
    plan = freeze_fixed(plan, fixed_segments(segments, plan.model))
    found: list[StageNeeds] = []
    seen: set[tuple[object, ...]] = set()
    # Layers, sizes and what of them is trained: equal ones have equal graphs.
    looks = {name: f"{module!r} {sorted(parameters.frozen(module))}" for name, module in segments.items()}
    for done, stage in enumerate(plan.stages):
        on_progress(done, len(plan.stages))
        terms = stage_terms(plan, stage)
        shape = (
            *(looks[name] for name in stage.active),
            terms.has_teacher,
            "frozen",
            *sorted({looks[name] for name in stage.frozen}),
        )
        if shape in seen:
            continue
        seen.add(shape)
        programs = ProgramSet(plan, {_ANY: {}}, None, _not_lowered)
        split = plan.embeds_first
        frozen: dict[Precision, dict[str, tuple[ExportedProgram, int]]] = {}
        for precision in get_args(Precision):
            chosen = plan.model_copy(update={"training": training.model_copy(update={"prefix_precision": precision})})
            prefix = ProgramSet(chosen, {_ANY: {}}, None, _not_lowered)
            different = {looks[name]: name for name in stage.frozen}.values()
            added = {prefix.add_frozen(name, segments[name])[_ANY]: name for name in different}
            frozen[precision] = {
                key: (prefix.wanted[key].graph, _weight_bytes(segments[name], prefix.wanted[key].precision))
                for key, name in added.items()
            }
        for present in ((), *_view_sets(plan)):
            cut = cut_stage(segments, plan.model, stage, pools=pools, until_embeddings=split, terms=terms, present=present)
            train, evaluation = programs.add_stage(stage, cut)
            keys: dict[Role, str] = {"train": train[_ANY]}
            if split:
                loss = programs.add_view_loss() if present else programs.add_loss()
                keys = {"embed": evaluation[_ANY], "loss": loss[_ANY], "backward": train[_ANY]}
            count = sum(spec.count for spec in cut.weights)
            found.append(
                StageNeeds(
                    stage=stage,
                    parameters=count,
                    batch_size=plan.training.batch_size,
                    graphs={role: programs.wanted[key].graph for role, key in keys.items()},
                    frozen={precision: tuple(graphs.values()) for precision, graphs in frozen.items()},
                    embedding_bytes=embedding_bytes(plan) if split else 0,
                    held_values=held_values(plan, count, cut.reference_sizes) + cut.frozen_values,
                )
            )
    on_progress(len(plan.stages), len(plan.stages))
    return found


def _view_sets(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """The devices with one modality whose step is another one (`ModelDescription.of_device`): with two views of a large encoder
    it may take more than that of a pair with a small one. Other devices with fewer modalities never take more."""
    return tuple(subset for subset in plan.device_modalities if plan.model.of_device(subset) is not plan.model)


def _weight_bytes(module: nn.Module, precision: Precision) -> int:
    """A frozen segment's weights as they are in memory; as int8, the largest one is there in float32 for a moment."""
    sizes = [value.numel() for value in module.parameters()]
    return sum(sizes) + 4 * max(sizes, default=0) if precision == "int8" else 4 * sum(sizes)


def _not_lowered(engine: EngineName, graph: ExportedProgram) -> Callable[[], LoweredProgram]:
    def lower() -> LoweredProgram:
        raise AssertionError("a prediction lowers nothing")

    return lower
