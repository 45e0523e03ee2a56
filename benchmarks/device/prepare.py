"""Programs for the cases, in a folder that can be carried to a device: `bench.json` and the program files beside it.

This needs torch and the compilers; running what is in the folder needs numpy and the engine. Lowered programs are kept in
$LAMINA_CACHE, as `lamina export` does.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from benchmarks.demo.report import versions
from benchmarks.device.cases import BUNDLE, BenchBundle, Case, Input, PreparedCase, ProgramFile, Side
from benchmarks.device.workloads import WORKLOADS, one_stage_plan, stage_of
from export.build import export_bundle
from export.graphs.cut import StageCut, cut_stage, find_segments
from export.graphs.differentiate import trace_step
from export.graphs.trace import EXAMPLE_BATCH, forward_graph, graph_text
from export.inputs import example_inputs
from export.lowering.cache import ProgramCache, default_cache, program_key
from export.lowering.worker import LoweredProgram, end_idle_processes, lowering_pool
from export.models.models import build_model
from lamina.bundles.bundle import blob_path
from lamina.bundles.manifest import LABEL, EngineName, Manifest, Program
from lamina.encoding.tensors import hash_bytes
from lamina.errors import ConfigError, LaminaError
from lamina.files import write_durably
from lamina.plans.model import ModelDescription
from lamina.plans.plan import Plan, Stage
from lamina.plans.segments import TensorSpec

PROGRAMS = "programs"
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """One cell of the table to prepare: a case of a workload, at a batch size and with one trained block."""

    workload: str
    side: Side
    case: Case
    batch: int
    micro_batch: int | None
    block: int | None

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ConfigError(f"the micro-batch {self.micro_batch} does not divide the batch {self.batch}")
        layers = max(encoder.layers for encoder in WORKLOADS[self.workload].model.encoders)
        if self.block is not None and not 0 <= self.block < layers:
            raise ConfigError(f"workload {self.workload!r} has blocks 0 to {layers - 1}, not {self.block}")


def prepare(
    orders: Sequence[Order],
    folder: Path,
    command: str,
    on_progress: OnProgress = lambda text: None,
    workers: int | None = None,
) -> BenchBundle:
    """Writes the folder. A case whose programs cannot be made stays in the list with the reason; the others are made.

    At most `workers` processes lower at the same time (default: one per core).
    """
    if folder.exists() and any(path.name not in (BUNDLE, PROGRAMS) for path in folder.iterdir()):
        raise ConfigError(f"{folder} holds other files; give an empty folder")
    (folder / PROGRAMS).mkdir(parents=True, exist_ok=True)
    cases = []
    with TemporaryDirectory(prefix="lamina-bench-") as scratch:
        exports = Exports(Path(scratch), on_progress, workers)
        for done, order in enumerate(orders, start=1):
            on_progress(f"prepare {done} of {len(orders)}: {order.workload}, {order.side}, {order.case.name}")
            cases.append(_prepare(order, folder, exports))
    end_idle_processes()  # or they would hold hundreds of MiB while the cases are measured
    bundle = BenchBundle(command=command, versions=versions(), cases=tuple(cases))
    write_durably(folder / BUNDLE, bundle.to_json())
    return bundle


class Exports:
    """Bundles as `lamina export` makes them, each once: several cases share one."""

    def __init__(self, folder: Path, on_progress: OnProgress, workers: int | None) -> None:
        self._folder, self._on_progress, self._workers = folder, on_progress, workers
        self._done: dict[tuple[bytes, EngineName], tuple[Path, Manifest]] = {}

    def bundle(self, plan: Plan, engine: EngineName) -> tuple[Path, Manifest]:
        key = (plan.to_json(), engine)
        if key not in self._done:
            folder = self._folder / str(len(self._done))

            def show(phase: str, done: int, total: int) -> None:
                self._on_progress(f"prepare: {plan.name} for {engine}, {phase} {done} of {total}")

            self._done[key] = folder, export_bundle(plan, folder, (engine,), on_progress=show, workers=self._workers)
        return self._done[key]


def _prepare(order: Order, folder: Path, exports: Exports) -> PreparedCase:
    workload = WORKLOADS[order.workload]
    graph: Literal["full", "cut"] = "cut" if order.case.graph == "cut" else "full"
    plan = one_stage_plan(
        workload, graph, order.block, order.batch, order.micro_batch, "int8" if order.case.prefix == "int8" else "fp32"
    )
    stage = plan.stages[0]
    active = stage_of(workload.model, order.block).active if order.case.graph == "flagged" else stage.active
    cut = _shapes(plan, stage)
    case = PreparedCase(
        workload=order.workload,
        side=order.side,
        case=order.case.name,
        batch=order.batch,
        micro_batch=order.micro_batch,
        block=order.block,
        unavailable=order.case.lacks(order.side),
        objective=plan.model.objective.kind,
        weights=tuple(spec.shape for spec in cut.weights),
        is_trained=tuple(spec.name.split("/")[0] in active for spec in cut.weights),
        inputs=_inputs(plan.model, cut.inputs),
        raw_inputs=_inputs(plan.model, _shapes(plan, stage_of(plan.model, 0)).inputs),
        model=plan.model.model_dump(mode="json"),
        stage=stage,
        active=active,
    )
    if case.unavailable or order.side == "eager":
        return case
    try:
        if order.case.graph == "flagged":
            return case.model_copy(update=_flagged(plan, case, folder))
        return case.model_copy(update=_exported(plan, case, order.case, folder, exports))
    except LaminaError as error:
        return case.model_copy(update={"unavailable": f"its programs cannot be made: {error.message}"})


def _shapes(plan: Plan, stage: Stage) -> StageCut:
    """The cut of a stage without memory for its weights."""
    with torch.device("meta"):
        return cut_stage(build_model(plan.model, 0).segments(), plan.model, stage)


def _exported(plan: Plan, case: PreparedCase, kind: Case, folder: Path, exports: Exports) -> dict[str, object]:
    """The programs as `lamina export` makes them."""
    engine = case.engine
    bundle, manifest = exports.bundle(plan, engine)
    stage, programs = manifest.stages[0], {}
    train = manifest.programs[stage.train[engine]]
    if kind.is_micro and train.max_batch != case.micro_batch:
        return {"unavailable": "this lamina exports no micro-batches"}
    if kind.is_micro and case.objective == "contrastive":
        programs["backward"] = train
        programs["embed"] = manifest.programs[stage.eval[engine]]
        programs["loss"] = manifest.programs[manifest.loss_programs[engine]]
    else:
        programs["train"] = train
    frozen = _frozen(manifest, plan, engine) if kind.prefix else {}
    if kind.prefix == "int8" and not any(program.precision == "int8" for chain in frozen.values() for program in chain):
        return {"unavailable": "nothing is int8: below the trained block there are only stems"}
    return {
        "programs": {role: _file(plan.model, program, role, bundle, folder) for role, program in programs.items()},
        "frozen": {
            modality: tuple(_file(plan.model, program, "frozen", bundle, folder) for program in chain)
            for modality, chain in frozen.items()
        },
        "planned_activation_bytes": max(program.activation_bytes for program in programs.values()),
    }


def _frozen(manifest: Manifest, plan: Plan, engine: EngineName) -> dict[str, list[Program]]:
    """The frozen programs of each modality, in the order its features pass them."""
    chains = {name: plan.stages[0].frozen_chain(plan.model, name) for name in plan.model.modalities}
    of_segment = manifest.frozen_programs[engine]
    return {modality: [manifest.programs[of_segment[name]] for name in chain] for modality, chain in chains.items() if chain}


def _file(model: ModelDescription, program: Program, role: str, bundle: Path, folder: Path) -> ProgramFile:
    """The role is that of the place: torch's file of the forward pass serves several."""
    target = folder / PROGRAMS / program.blob
    if not target.exists():
        shutil.copyfile(blob_path(bundle, program.blob), target)
    return ProgramFile(
        file=f"{PROGRAMS}/{program.blob}",
        role=role,
        weights=program.weights,
        inputs=_inputs(model, program.inputs),
        max_batch=program.max_batch,
        precision=program.precision,
        activation_bytes=program.activation_bytes,
    )


def _flagged(plan: Plan, case: PreparedCase, folder: Path) -> dict[str, object]:
    """What lamina does not export: a graph that still holds the frozen layers, and differentiates only the active ones.

    The program gives loss, correct, and a gradient for each trained weight.
    """
    cut = cut_stage(find_segments(build_model(plan.model, 0), plan.model), plan.model, plan.stages[0])
    example = example_inputs(plan.model, cut.inputs, EXAMPLE_BATCH)
    forward = forward_graph(cut.module, example, case.batch)
    run = forward.module()

    def step(weights: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values = [weight.detach().requires_grad_(flag) for weight, flag in zip(weights, case.is_trained, strict=True)]
        loss, correct = run(tuple(values), inputs)
        return (loss.detach(), correct, *torch.autograd.grad(loss, [value for value in values if value.requires_grad]))

    lowered = _lower_once(case.engine, trace_step(step, forward))
    digest = hash_bytes(lowered.data)
    (folder / PROGRAMS / digest).write_bytes(lowered.data)
    program = ProgramFile(
        file=f"{PROGRAMS}/{digest}",
        role="train",
        weights=case.weights,
        inputs=case.inputs,
        max_batch=case.batch,
        precision="fp32",
        activation_bytes=lowered.arena_bytes,
    )
    return {"programs": {"train": program}, "planned_activation_bytes": lowered.arena_bytes}


def _lower_once(engine: EngineName, graph: torch.export.ExportedProgram) -> LoweredProgram:
    """Lowers, or takes the program from the cache."""
    cache = ProgramCache(default_cache())
    made_by = {name: number for name, number in versions().items() if name in ("lamina", "torch", "executorch", "onnx")}
    key = program_key(graph_text(graph), engine, made_by | {"flagged": "1"})
    found = cache.get(key)
    if found is None:
        with lowering_pool(1) as start:
            found = start(engine, graph)()
        cache.put(key, found)
    return found


def _inputs(model: ModelDescription, specs: Sequence[TensorSpec]) -> tuple[Input, ...]:
    return tuple(Input(name=s.name, shape=s.shape, dtype=s.dtype, bound=_bound(model, s)) for s in specs)


def _bound(model: ModelDescription, spec: TensorSpec) -> int:
    """The exclusive upper bound of an integer input, 0 for others."""
    if spec.dtype != "int64":
        return 0
    if spec.name == LABEL:
        return model.objective.classes if model.objective.kind == "supervised" else 0
    texts = [encoder.input.vocabulary for encoder in model.encoders if encoder.input.kind == "text_tokens"]
    return texts[0]


def installed_sides() -> tuple[Side, ...]:
    """Eager PyTorch, and the engines whose compilers are installed here."""
    from importlib.util import find_spec

    needs: dict[Side, tuple[str, ...]] = {
        "eager": ("torch",),
        "onnxruntime": ("onnx", "onnxscript"),
        "executorch": ("executorch", "torchao"),
        "torch": ("torch",),
    }
    return tuple(side for side, modules in needs.items() if all(find_spec(module) for module in modules))
