"""Exporting a split plan: frozen backbone + adapters -> programs for both ends, as a signed bundle.

Every program is held to the modules it was made of, by its own runtime where that is installed. Modalities of equal shape share
their programs; a repeated export takes them from the cache.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from export.cost.counts import peak_live_bytes
from export.graphs.trace import Arrays, example_batch, graph_text
from export.lowering.cache import ProgramCache, default_cache, program_key
from export.lowering.parity import TOLERANCE
from export.lowering.runtimes import is_installed, open_program
from export.lowering.toolchain import FORMATS, check_folder, tool_versions, write_bundle
from export.lowering.worker import LoweredProgram, lowering_pool
from export.models.models import build_model
from export.split.functions import input_spec, split_functions
from export.split.graphs import Restore, SplitFunction, eager, graph
from export.split.modules import Adapter, Fusion
from lamina import __version__
from lamina.bundles.keys import own_key
from lamina.bundles.manifest import ENGINES, EngineName
from lamina.encoding.tensors import decode_file, encode, hash_bytes
from lamina.errors import ConfigError, ParityError
from lamina.plans.segments import Segment, TensorSpec, classifier, layer, norm, stem
from lamina.split.manifest import SplitManifest, SplitProgram, taken_weights
from lamina.split.plan import FUSION, SplitPlan, modality_adapter, task_adapter

OnProgress = Callable[[str, int, int], None]


def export_split(
    plan: SplitPlan,
    folder: Path,
    engines: Sequence[EngineName] = ("onnxruntime",),
    *,
    weights: Path | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
    workers: int | None = None,
    cache: Path | None = None,
) -> SplitManifest:
    """Writes `manifest.json` and `blobs/` into an empty folder (or over the same bundle), and returns the manifest.

    `weights` is a folder as `lamina pull` writes it, `<segment>.safetensors`: the frozen backbone. Without it the backbone is
    random. Raises ConfigError for another folder, TensorFileError for weights of another model, CutError for a graph that
    cannot be traced, ParityError for a program that computes something else than the modules.
    """
    if not engines or not set(engines) <= set(ENGINES):
        raise ConfigError(f"engines must be one or more of {', '.join(ENGINES)}; given {list(engines)}")
    check_folder(folder, lambda path: _other_plan(path, plan))
    versions = {engine: tool_versions(engine) for engine in engines}
    signer = own_key()
    parts = make_parts(plan, weights)
    tensors = {name: [value.detach() for value in module.parameters()] for name, module in parts.items()}
    files = {
        name: encode(
            {key: value.detach().numpy() for key, value in module.named_parameters()},
            "int8" if name in plan.frozen and plan.precision(name) == "int8" else "fp32",
        )
        for name, module in parts.items()
    }
    functions = split_functions(plan, parts)
    by_engine: dict[EngineName, dict[str, SplitProgram]] = {engine: {} for engine in engines}
    blobs: dict[str, bytes] = {hash_bytes(data): data for data in files.values()}
    known: dict[object, object] = {}
    with lowering_pool(workers or os.cpu_count() or 1) as start:
        makers = [_Maker(plan, function, tensors) for function in functions]
        for done, maker in enumerate(makers):
            on_progress("trace", done, len(makers))
            maker.trace(known)
        for engine in engines:
            tools = versions[engine] | {"format": str(FORMATS[engine])}
            store = ProgramCache(cache or default_cache())
            waiting: dict[str, Callable[[], LoweredProgram]] = {}
            fresh: set[str] = set()
            for maker in makers:
                key = program_key("split " + graph_text(maker.graph), engine, tools)
                maker.keys[engine] = key
                if key in waiting:
                    continue
                found = store.get(key)
                if found is None:
                    fresh.add(key)
                    waiting[key] = start(engine, maker.graph)
                else:
                    waiting[key] = lambda found=found: found
            lowered: dict[str, LoweredProgram] = {}
            for done, maker in enumerate(makers):
                on_progress(f"lower for {engine}", done, len(makers))
                key = maker.keys[engine]
                if key not in lowered:
                    lowered[key] = waiting[key]()
                    if key in fresh:
                        maker.check(engine, lowered[key].data)
                        store.put(key, lowered[key])
                data = lowered[key].data
                blobs[hash_bytes(data)] = data
                by_engine[engine][maker.function.name] = maker.describe(engine, lowered[key])
    manifest = SplitManifest(
        plan=plan,
        parts=tuple(
            Segment(
                name=name,
                modality=None if name == FUSION else name.partition(".")[0],
                tensors=tuple(TensorSpec(name=k, shape=tuple(v.shape)) for k, v in module.named_parameters()),
            )
            for name, module in parts.items()
        ),
        initial_weights={name: hash_bytes(data) for name, data in files.items()},
        programs=by_engine,
        blobs={digest: len(data) for digest, data in sorted(blobs.items())},
        versions={"lamina": __version__, **{p: v for found in versions.values() for p, v in found.items()}},
    )
    write_bundle(folder, manifest.to_json(), blobs, signer)
    return manifest


def make_parts(plan: SplitPlan, weights: Path | None = None) -> dict[str, nn.Module]:
    """Part name -> module, in the manifest's order; the same plan gives the same weights."""
    model = build_model(plan.model, plan.seed).eval()
    found: dict[str, nn.Module] = {}
    for m in plan.modalities:
        encoder = model.encoders[m]
        found[stem(m)] = encoder.stem
        found |= {layer(m, index): block for index, block in enumerate(encoder.layers)}
        found[norm(m)] = encoder.norm
    if weights is not None:
        for name, module in found.items():
            _load(module, weights / f"{name}.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed + 1)  # apart from the backbone: its weights may come from a file
        for m in plan.modalities:
            found[modality_adapter(m)] = Adapter(plan.width, plan.adapter)
            found[task_adapter(m)] = Adapter(plan.width, plan.adapter)
            found[classifier(m)] = nn.Linear(plan.width, plan.classes)
        for m in plan.modalities[1:]:  # what is shared starts equal
            first = found[task_adapter(plan.modalities[0])]
            found[task_adapter(m)].middle.load_state_dict(first.middle.state_dict())  # type: ignore[union-attr, operator]
        found[FUSION] = Fusion(plan.width, len(plan.modalities), plan.classes, plan.fusion)
    return found


@dataclass
class _Maker:
    """One program on its way: traced, lowered for each engine, checked."""

    plan: SplitPlan
    function: SplitFunction
    tensors: Mapping[str, list[Tensor]]

    def __post_init__(self) -> None:
        self.keys: dict[EngineName, str] = {}
        function, plan = self.function, self.plan
        held_int8 = any(name in plan.frozen and plan.precision(name) == "int8" for name in function.parts)
        self.precision = "int8" if held_int8 else "fp32"
        self.inputs = tuple(input_spec(plan, function.name, name) for name in function.inputs)
        self.example = self._example(example_batch(plan.training.batch_size))
        self.weights = self._taken({name: self.tensors[name] for name in function.parts})

    @property
    def restore(self) -> Restore:
        """The modules' tensors from what the program takes."""
        plan, precision, function = self.plan, self.precision, self.function
        shapes = [(name, tuple(value.shape)) for name in function.parts for value in self.tensors[name]]

        def restore(taken: Arrays) -> Arrays:
            if precision == "fp32":
                return taken
            values, found = iter(taken), []
            for name, shape in shapes:
                if name in plan.frozen and plan.precision(name) == "int8" and len(shape) == 2:
                    found.append(next(values).to(torch.float32) * next(values).unsqueeze(1))
                else:
                    found.append(next(values).reshape(shape))
            return tuple(found)

        return restore

    def trace(self, known: dict[object, object]) -> None:
        """Sets `graph`; modalities whose modules and shapes are equal have one."""
        kind = self.function.name.rpartition(".")[2]
        shapes = tuple(tuple(value.shape) for value in self.weights)
        encoder = self.plan.encoder(self.function.name.partition(".")[0]) if "." in self.function.name else None
        look = (kind, shapes, tuple((i.shape, i.dtype) for i in self.inputs), encoder and encoder.heads)
        if kind == "prefix" and encoder is not None:
            look += (encoder.input.model_dump_json(),)
        if look not in known:
            known[look] = graph(self.function, self.restore, self.weights, self.example, self.plan.training.batch_size)
        self.graph = known[look]

    def check(self, engine: EngineName, data: bytes) -> None:
        """Raises ParityError unless the program, with one sample and with two, gives what the modules give."""
        if not is_installed(engine):
            return
        run = open_program(engine, data, "frozen")
        generator = torch.Generator().manual_seed(3)
        moved = {
            name: [v + 0.05 * torch.randn(v.shape, generator=generator) for v in self.tensors[name]]
            for name in self.function.parts
        }
        weights = self._taken(moved)
        for batch in sorted({1, len(self.example[0])}):
            inputs = tuple(value[:batch] for value in self.example)
            expected = eager(self.function, self.restore, weights, inputs)
            actual = run(weights, inputs)
            for name, left, right in zip(self.function.outputs, actual, expected, strict=True):
                allowed = TOLERANCE * max(1.0, float(right.abs().max()))
                error = float((left - right).abs().max()) if left.shape == right.shape else float("inf")
                if not error <= allowed:
                    raise ParityError(
                        f"{self.function.name} for {engine}: output {name} is off by {error:.2g}, allowed {allowed:.2g}; the "
                        "runtime does not compute what PyTorch computes"
                    )

    def describe(self, engine: EngineName, lowered: LoweredProgram) -> SplitProgram:
        plan, function = self.plan, self.function
        live = peak_live_bytes(self.graph, plan.training.batch_size) if lowered.arena_bytes is None else lowered.arena_bytes
        return SplitProgram(
            engine=engine,
            blob=hash_bytes(lowered.data),
            runs_on=function.runs_on,
            parts=function.parts,
            weights=tuple(self._shapes()),
            inputs=self.inputs,
            outputs=function.outputs,
            max_batch=plan.training.batch_size,
            precision=self.precision,  # type: ignore[arg-type]
            activation_bytes=live,
        )

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the weights as the manifest counts them: an int8 matrix with its scales is one."""
        if self.precision == "fp32":
            return [tuple(value.shape) for value in self.weights]
        found: list[tuple[int, ...]] = []
        for name in self.function.parts:
            is_int8 = name in self.plan.frozen and self.plan.precision(name) == "int8"
            found += [tuple(v.shape) if is_int8 else (v.numel(),) for v in self.tensors[name]]
        return found

    def _taken(self, tensors: Mapping[str, list[Tensor]]) -> Arrays:
        return tuple(
            torch.from_numpy(value)
            for name, values in tensors.items()
            for value in taken_weights(self.plan, self.precision, name, [v.numpy() for v in values])  # type: ignore[arg-type]
        )

    def _example(self, batch: int) -> Arrays:
        generator = torch.Generator().manual_seed(0)
        found = []
        for spec in self.inputs:
            shape = (batch, *spec.shape)
            if spec.dtype == "float32":
                found.append(torch.randn(shape, generator=generator))
            else:
                text = self.function.name.endswith(".prefix")
                limit = self.plan.encoder(self.function.name.partition(".")[0]).input.vocabulary if text else self.plan.classes
                found.append(torch.randint(limit, shape, generator=generator))
        return tuple(found)


def _load(module: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a folder of <segment>.safetensors, as `lamina pull` writes it")
    specs = [TensorSpec(name=name, shape=tuple(value.shape)) for name, value in module.named_parameters()]
    found = decode_file(str(path), specs)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.from_numpy(found[name]))


def _other_plan(path: Path, plan: SplitPlan) -> str | None:
    """The name of the plan that this manifest is of, if it is another one."""
    found = SplitManifest.from_file(path).plan
    return found.name if found != plan else None
