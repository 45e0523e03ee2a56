"""The programs of a bundle: which ones its stages need, each graph traced, lowered and checked once.

Modules that look alike and compute the same are traced once, and a graph that was seen before, in this bundle or in the cache,
is neither lowered nor checked again; so layer-wise stages after the first share their programs, and equal frozen layers of all
modalities share one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from torch.export import ExportedProgram

from export.cost.counts import peak_live_bytes
from export.faults.faults import Fault, fault_of
from export.faults.supported import unsupported
from export.faults.trace_errors import explain
from export.graphs.cut import StageCut
from export.graphs.frozen import frozen_graph, segment_precision
from export.graphs.joint import backward_graph, joint_graph, loss_graph
from export.graphs.sharing import Look, computes_the_same, look
from export.graphs.stage_module import Terms, random_references
from export.graphs.trace import Arrays, example_batch, forward_graph, graph_text
from export.inputs import LABELS, embedding, example_inputs, segment_input
from export.lowering.cache import ProgramCache, program_key
from export.lowering.parity import check_finite, check_parity
from export.lowering.toolchain import FORMATS
from export.lowering.worker import LoweredProgram
from export.models.parameters import frozen, trained
from export.objectives.objectives import ContrastiveLoss
from export.objectives.self_supervised import KeyLoss, TwoViewLoss
from lamina.bundles.manifest import EngineName, Precision, Program, ProgramReference, Role, gradient_input
from lamina.errors import CutError, ExportError, ParityError
from lamina.names import ANY_MODALITY, key_of, second_view
from lamina.plans.model import Contrastive, ModelDescription, SelfSupervised
from lamina.plans.plan import Plan, Stage
from lamina.plans.segments import TensorSpec

Start = Callable[[EngineName, ExportedProgram], Callable[[], LoweredProgram]]
Keys = dict[EngineName, str]
"""Cache key of a program, by engine."""
FROZEN_INPUT = "x"


def stage_terms(plan: Plan, stage: Stage) -> Terms:
    """What the loss of a stage has besides its main term. Heads that nobody has trained yet are no teacher."""
    return Terms(has_teacher=any(earlier.rounds for earlier in plan.stages[: stage.index]))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """What torch says while it traces, with the name of what was traced and a way out. Raises CutError."""
    try:
        yield
    except Exception as error:  # torch and the user's code raise whatever they like
        reason, remedy = explain(error)
        raise CutError(f"{what} cannot be traced: {reason}; {remedy}") from error


@dataclass
class _Wanted:
    """A program that the bundle needs. `lowered` waits for its bytes."""

    engine: EngineName
    role: Role
    name: str
    graph: ExportedProgram  # of the values between inputs and outputs: for torch the joint graph, whatever the file holds
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    example: Arrays
    max_batch: int
    precision: Precision
    lowered: Callable[[], LoweredProgram]
    is_new: bool
    references: tuple[ProgramReference, ...] = ()
    copies: Arrays = ()
    """Example tensors of the references."""


def _wait(wanted: _Wanted) -> LoweredProgram:
    """The lowered program. Raises ExportError that names it."""
    try:
        return wanted.lowered()
    except ExportError as error:
        raise ExportError(f"{wanted.name}: {error.message}") from error


@dataclass
class ProgramSet:
    """Collects the programs of a bundle by cache key. `versions` are, by engine, those of the packages that lower for it."""

    plan: Plan
    versions: dict[EngineName, dict[str, str]]
    cache: ProgramCache | None
    start: Start
    wanted: dict[str, _Wanted] = field(default_factory=dict)
    lowered: dict[str, LoweredProgram] = field(default_factory=dict)
    """Filled by `finish`."""
    errors: dict[str, float] = field(default_factory=dict)
    """By key, the largest error (`check_parity`) of each program that `finish` checked."""
    stages_of: dict[Look, list[tuple[nn.Module, tuple[Keys, Keys]]]] = field(default_factory=dict)
    frozen_of: dict[Look, list[tuple[nn.Module, Keys]]] = field(default_factory=dict)
    joint_of: dict[str, ExportedProgram] = field(default_factory=dict)  # by the text of the forward graph it is made from
    looked_at: set[object] = field(default_factory=set)

    @property
    def micro_batch(self) -> int:
        return self.plan.training.samples_in_memory

    def add_stage(self, stage: Stage, cut: StageCut, what: str = "") -> tuple[Keys, Keys]:
        """Keys of the stage's training and evaluation programs; `what` follows their names in messages.

        The programs of a step in micro-batches (`Plan.embeds_first`), unless the cut module has its objective.
        """
        example = self._example(cut.inputs, model=cut.description)
        shape = look(cut.module, cut.inputs, cut.references)
        for module, keys in self.stages_of.get(shape, ()):
            if computes_the_same(module, cut.module, (*random_references(cut.module), *example)):
                return keys
        with _naming(f"stage {stage.index}{what}"):
            if cut.module.until_embeddings:
                keys = self._add_embedding_stage(stage, cut, what)
            else:
                keys = self._add_whole_stage(stage, cut, what, self.micro_batch)
        self.stages_of.setdefault(shape, []).append((cut.module, keys))
        return keys

    def new_faults(self) -> Iterator[Fault]:
        """Why programs that were added since cannot be lowered, or what they give cannot be compared, as far as it is known
        before: an engine lacks an operator, or PyTorch itself gives NaN."""
        for key, wanted in self.wanted.items():
            if key in self.looked_at or not wanted.is_new:
                continue
            self.looked_at.add(key)
            where = f"({wanted.name})"
            lacking = unsupported(wanted.engine, wanted.graph)
            if lacking:
                why = "; ".join(f"has no {operator}: {way_out}" for operator, way_out in lacking)
                operators, remedies = ("; ".join(dict.fromkeys(texts)) for texts in zip(*lacking, strict=True))
                message = f"{wanted.name}: {wanted.engine} {why}"
                yield Fault(where, f"{wanted.engine} cannot run {operators}", remedies, message, wanted.engine, ExportError)
            if id(wanted.graph) not in self.looked_at:
                self.looked_at.add(id(wanted.graph))  # engines share it, and `wanted` keeps it
                try:
                    check_finite(wanted.role, wanted.name, wanted.module, wanted.example, wanted.precision, wanted.copies)
                except ParityError as error:
                    yield fault_of(where, error)

    def add_training(self, stage: Stage, cut: StageCut, what: str, max_batch: int) -> Keys:
        """Keys of a training program alone."""
        with _naming(f"stage {stage.index}{what}"):
            return self._add_training(self._label("train", stage) + what, cut, max_batch)[0]

    def _add_whole_stage(self, stage: Stage, cut: StageCut, what: str, max_batch: int) -> tuple[Keys, Keys]:
        train, forward = self._add_training(self._label("train", stage) + what, cut, max_batch)
        example = self._example(cut.inputs, max_batch, cut.description)
        if cut.evaluation is not cut.module:
            forward = forward_graph(cut.evaluation, example, max_batch)
        label = self._label("eval", stage) + what
        return train, self._add("eval", label, forward, cut.evaluation, cut.inputs, example, max_batch=max_batch)

    def _add_training(self, label: str, cut: StageCut, max_batch: int) -> tuple[Keys, ExportedProgram]:
        """Keys of the training program, and its forward graph."""
        example, copies = self._example(cut.inputs, max_batch, cut.description), random_references(cut.module)
        forward = forward_graph(cut.module, example, max_batch, copies)
        names = [spec.name for spec in cut.weights]
        joint = self._joint(forward, lambda: joint_graph(forward, names))
        keys = self._add(
            "train",
            label,
            joint,
            cut.module,
            cut.inputs,
            example,
            for_torch=forward,
            max_batch=max_batch,
            references=cut.references,
            copies=copies,
        )
        return keys, forward

    def add_loss(self) -> Keys:
        """Keys of the contrastive loss of a whole batch, or of a self-supervised one. It takes 1..batch_size samples: no
        operation of it asks for more."""
        objective = self.plan.model.objective
        if isinstance(objective, SelfSupervised):
            (modality,) = self.plan.model.modalities
            if objective.has_predictor:
                return self._add_key_loss(modality, objective)
            return self._add_view_loss(modality, objective.temperature)
        assert isinstance(objective, Contrastive)
        inputs = tuple(embedding(self.plan.model, modality) for modality in self.plan.model.modalities)
        inputs += (LABELS,) if objective.classes is not None else ()
        return self._add_loss("the loss program", ContrastiveLoss(objective), inputs)

    def add_view_loss(self) -> Keys:
        """Keys of the loss of the two views of a whole batch, for devices with one modality of a contrastive model."""
        objective = self.plan.model.objective
        assert isinstance(objective, Contrastive)
        return self._add_view_loss(ANY_MODALITY, objective.temperature)

    def _add_view_loss(self, modality: str, temperature: float) -> Keys:
        inputs = tuple(embedding(self.plan.model, name) for name in (modality, second_view(modality)))
        return self._add_loss("the loss program of two views", TwoViewLoss(temperature), inputs)

    def _add_key_loss(self, modality: str, objective: SelfSupervised) -> Keys:
        views = (modality, second_view(modality))
        inputs = tuple(embedding(self.plan.model, name) for name in (*views, *map(key_of, views)))
        return self._add_loss("the loss program", KeyLoss(objective.method, objective.temperature), inputs)

    def _add_loss(self, label: str, module: nn.Module, inputs: tuple[TensorSpec, ...]) -> Keys:
        batch = self.plan.training.batch_size
        example = self._example(inputs, batch)
        forward = forward_graph(module, example, batch)
        graph = loss_graph(forward)
        return self._add("loss", label, graph, module, inputs, example, for_torch=forward, max_batch=batch)

    def add_frozen(self, name: str, module: nn.Module) -> Keys:
        """Keys of the program of one frozen segment."""
        spec = segment_input(self.plan.model, name)
        example = self._example((spec,))
        precision = segment_precision(self.plan, name)
        # Equal layers of two modalities are one program, so its input is named for neither.
        inputs = (spec.model_copy(update={"name": FROZEN_INPUT}),)
        shape = look(module, inputs, precision)
        for known, keys in self.frozen_of.get(shape, ()):
            if computes_the_same(known, module, example):
                return keys
        with _naming(name):
            graph = frozen_graph(module, example, self.micro_batch, precision)
        label = f"the frozen program of {name}"
        keys = self._add("frozen", label, graph, module, inputs, example, precision=precision)
        self.frozen_of.setdefault(shape, []).append((module, keys))
        return keys

    def finish(self, on_progress: Callable[[int, int], None]) -> None:
        """Waits for every program, checks the new ones against eager PyTorch, and stores them in the cache."""
        on_progress(0, len(self.wanted))
        for key, wanted in self.wanted.items():
            lowered = _wait(wanted)
            if wanted.is_new:
                error = check_parity(
                    lowered.data,
                    wanted.engine,
                    wanted.role,
                    wanted.name,
                    wanted.module,
                    wanted.example,
                    wanted.precision,
                    wanted.copies,
                )
                if error is not None:
                    self.errors[key] = error
                if self.cache:
                    self.cache.put(key, lowered)
            self.lowered[key] = lowered
            on_progress(len(self.lowered), len(self.wanted))

    def activation_bytes(self, key: str) -> int:
        """Peak bytes of intermediate values at the program's largest batch (`lamina.bundles.manifest.Program`)."""
        arena = self.lowered[key].arena_bytes
        wanted = self.wanted[key]
        return peak_live_bytes(wanted.graph, wanted.max_batch) if arena is None else arena

    def describe(self, key: str, blob: str) -> Program:
        wanted = self.wanted[key]
        return Program(
            engine=wanted.engine,
            role=wanted.role,
            blob=blob,
            weights=tuple(tuple(value.shape) for value in trained(wanted.module).values()),
            frozen=tuple(tuple(value.shape) for value in frozen(wanted.module).values()),
            inputs=wanted.inputs,
            max_batch=wanted.max_batch,
            precision=wanted.precision,
            references=wanted.references,
            activation_bytes=self.activation_bytes(key),
        )

    def _add_embedding_stage(self, stage: Stage, cut: StageCut, what: str) -> tuple[Keys, Keys]:
        """Keys of the stage's `backward` and `embed` programs."""
        inputs = cut.inputs + tuple(embedding(self.plan.model, gradient_input(spec.name)) for spec in cut.inputs)
        example = self._example(inputs, model=cut.description)
        embed_example = example[: len(cut.inputs)]
        forward = forward_graph(cut.module, embed_example, self.micro_batch)
        copies = random_references(cut.evaluation)
        embed_forward = forward
        if cut.evaluation is not cut.module:
            embed_forward = forward_graph(cut.evaluation, embed_example, self.micro_batch, copies)
        names = [spec.name for spec in cut.weights]
        joint = self._joint(forward, lambda: backward_graph(forward, names))
        # The cut module leaves the gradients unread: they are for the torch engine, which differentiates this graph. As a
        # graph of its own it has its own entry in the manifest, with the inputs that `backward` takes.
        embedder = forward_graph(cut.module, example, self.micro_batch) if "torch" in self.versions else None
        backward, embed = self._label("backward", stage) + what, self._label("embed", stage) + what
        return (
            self._add("backward", backward, joint, cut.module, inputs, example, for_torch=embedder),
            self._add(
                "embed",
                embed,
                embed_forward,
                cut.evaluation,
                cut.inputs,
                embed_example,
                references=cut.references,
                copies=copies,
            ),
        )

    def _add(
        self,
        role: Role,
        name: str,
        graph: ExportedProgram,
        module: nn.Module,
        inputs: tuple[TensorSpec, ...],
        example: Arrays,
        *,
        for_torch: ExportedProgram | None = None,
        max_batch: int | None = None,
        precision: Precision = "fp32",
        references: tuple[ProgramReference, ...] = (),
        copies: Arrays = (),
    ) -> Keys:
        """Starts lowering where it is needed. `for_torch` is the graph in the torch file, which autograd completes."""
        keys: Keys = {}
        for engine, versions in self.versions.items():
            file_graph = for_torch if engine == "torch" and for_torch is not None else graph
            key = program_key(graph_text(file_graph), engine, versions | {"format": str(FORMATS[engine])})
            keys[engine] = key
            if key in self.wanted:
                continue
            known = self.cache.get(key) if self.cache else None
            lowered = self.start(engine, file_graph) if known is None else (lambda known=known: known)
            self.wanted[key] = _Wanted(
                engine=engine,
                role=role,
                name=name,
                graph=graph,
                module=module,
                inputs=inputs,
                example=example,
                max_batch=max_batch or self.micro_batch,
                precision=precision,
                lowered=lowered,
                is_new=known is None,
                references=references,
                copies=copies,
            )
        return keys

    def _joint(self, forward: ExportedProgram, make: Callable[[], ExportedProgram]) -> ExportedProgram:
        text = graph_text(forward)
        if text not in self.joint_of:
            self.joint_of[text] = make()
        return self.joint_of[text]

    def _example(
        self, specs: tuple[TensorSpec, ...], max_batch: int | None = None, model: ModelDescription | None = None
    ) -> Arrays:
        """Inputs of the plan's model, or of a device's own."""
        return example_inputs(model or self.plan.model, specs, example_batch(max_batch or self.micro_batch))

    @staticmethod
    def _label(role: Role, stage: Stage) -> str:
        return f"the {role} program of stage {stage.index}"
