"""A tiny model, its manifest, and its programs for all engines: what the exporter writes, small enough to read.

motion.stem: Linear(8, 4) on each token;  motion.layers.i: x + tanh(Linear(x));  motion.norm: x * w + b
motion.projection: Linear(4, 3) of the mean token;  head: Linear(3, 3);  loss: cross entropy of 3 classes
"""

import fcntl
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_client.job import Job, ProgramFile, Rows, SegmentFile, Tensor
from edge_client.rows.row_files import RowFile
from lamina.bundles.manifest import LABEL, Manifest, Program, StageCost, StagePrograms
from lamina.encoding.tensors import encode, hash_bytes
from lamina.plans.model import Encoder, ModelDescription, Projection, SensorWindows, Supervised
from lamina.plans.plan import SGD, Cohort, Plan, Training
from lamina.plans.segments import Segment, TensorSpec
from lamina.plans.strategies import make_stages

CHANNELS, SAMPLES, PATCH, TOKENS, WIDTH, CLASSES, MAX_BATCH, LAYERS = 2, 8, 4, 2, 4, 3, 8, 3
SHAPES = {"stem": (WIDTH, 8), "layer": (WIDTH, WIDTH), "norm": (WIDTH,), "projection": (3, WIDTH), "head": (CLASSES, 3)}
MODEL = ModelDescription(
    name="tiny",
    encoders=(
        Encoder(
            modality="motion",
            input=SensorWindows(channels=CHANNELS, samples=SAMPLES, patch=PATCH),
            width=WIDTH,
            heads=1,
            layers=LAYERS,
        ),
    ),
    projection=Projection(hidden=WIDTH, output=3),
    objective=Supervised(classes=CLASSES),
)


def kind_of(segment: str) -> str:
    return "layer" if ".layers." in segment else segment.rpartition(".")[2]


def make_segment(name: str) -> Segment:
    shape = SHAPES[kind_of(name)]
    tensors = (TensorSpec(name="weight", shape=shape), TensorSpec(name="bias", shape=shape[:1]))
    return Segment(name=name, modality=None if name == "head" else "motion", tensors=tensors)


def initial_weights(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {
        name: {
            spec.name: random.normal(size=spec.shape).astype(np.float32) * np.float32(0.5)
            for spec in make_segment(name).tensors
        }
        for name in SEGMENTS
    }


SEGMENTS = ["motion.stem", *(f"motion.layers.{i}" for i in range(LAYERS)), "motion.norm", "motion.projection", "head"]
RAW = TensorSpec(name="motion", shape=(CHANNELS, SAMPLES))
FEATURES = TensorSpec(name="motion", shape=(TOKENS, WIDTH))
LABELS = TensorSpec(name=LABEL, shape=(), dtype="int64")


def run_segments(segments, weights, x, label=None):
    """The eager model in torch: features if no label is given, else (loss, correct)."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    for index, name in enumerate(segments):
        w, b = weights[2 * index : 2 * index + 2]
        match kind_of(name):
            case "stem":
                x = x.reshape(-1, CHANNELS, TOKENS, PATCH).transpose(1, 2).reshape(-1, TOKENS, 8)
                x = linear(x, w, b)
            case "layer":
                x = x + torch.tanh(linear(x, w, b))
            case "norm":
                x = x * w + b
            case "projection":
                x = linear(x.mean(1), w, b)
            case "head":
                x = linear(x, w, b)
    return (x,) if label is None else (cross_entropy(x, label), (x.argmax(1) == label).sum())


@dataclass
class TinyPrograms:
    """Exports programs when they are first asked for, and keeps them in a folder that test processes may share."""

    folder: Path
    blobs: dict[str, bytes] = field(default_factory=dict)
    made: dict[tuple, Program] = field(default_factory=dict)

    def program(self, engine: str, role: str, segments: list[str]) -> Program:
        kinds = tuple(kind_of(name) for name in segments)
        key = (engine, role, kinds)
        if key not in self.made:
            digest = self._exported(engine, role, segments)
            inputs = (RAW if "stem" in kinds else FEATURES, LABELS)
            if role == "frozen":
                inputs = (TensorSpec(name="x", shape=inputs[0].shape),)
            self.blobs[digest] = (self.folder / digest).read_bytes()
            weights = tuple(spec.shape for name in segments for spec in make_segment(name).tensors)
            self.made[key] = Program(
                engine=engine,
                role=role,
                blob=digest,
                weights=weights,
                inputs=inputs,
                max_batch=MAX_BATCH,
                activation_bytes=0,
            )
        return self.made[key]

    def _exported(self, engine: str, role: str, segments: list[str]) -> str:
        """The hash of the program's file; the first process that asks exports it, the others wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "-".join((engine, role, *map(kind_of, segments)))
        with known.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not known.exists():
                data = export_program(engine, role, segments)
                (self.folder / hash_bytes(data)).write_bytes(data)
                known.write_text(hash_bytes(data))
        return known.read_text()

    def path(self, program: Program) -> Path:
        return self.folder / program.blob

    def file(self, program: Program) -> ProgramFile:
        """The program as a job names it."""
        return ProgramFile(
            path=str(self.path(program)),
            blob=program.blob,
            role=program.role,
            weights=program.weights,
            inputs=tensors(program.inputs),
            max_batch=program.max_batch,
        )

    def bundle(self, engine: str, rounds: int = 1, count: int = LAYERS, **training) -> tuple[Manifest, dict[str, bytes]]:
        """Manifest and all blobs of a layer-wise run of the tiny model for one engine, in `count` stages."""
        settings = {"batch_size": MAX_BATCH, "local_epochs": 2, "optimizer": SGD(momentum=0.5)}
        plan = Plan(
            name="tiny",
            model=MODEL,
            strategy="layerwise",
            stages=make_stages(MODEL, "layerwise", [rounds] * LAYERS, 0.1)[:count],
            training=Training(**(settings | training)),
            cohort=Cohort(size=1),
            seed=7,
        )
        programs: dict[str, Program] = {}
        stages = []
        for stage in plan.stages:
            found = {role: self.program(engine, role, list(stage.active)) for role in ("train", "eval")}
            programs |= {program.blob: program for program in found.values()}
            stages.append(
                StagePrograms(
                    index=stage.index,
                    train={engine: found["train"].blob},
                    eval={engine: found["eval"].blob},
                    cost=StageCost(
                        active_parameters=0,
                        frozen_parameters=0,
                        flops_per_sample=0,
                        prefix_flops_per_sample=0,
                        planned_bytes={engine: 0},
                        round_bytes_down=0,
                        round_bytes_up=0,
                        program_bytes={engine: 0},
                        frozen_bytes=0,
                    ),
                )
            )
        chain = SEGMENTS[: LAYERS + 1] if count > 1 else []
        frozen = {name: self.program(engine, "frozen", [name]) for name in chain}
        programs |= {program.blob: program for program in frozen.values()}
        blobs = {digest: self.blobs[digest] for digest in programs}
        weights = {name: encode(tensors) for name, tensors in initial_weights().items()}
        blobs |= {hash_bytes(data): data for data in weights.values()}
        manifest = Manifest(
            plan=plan,
            segments=tuple(make_segment(name) for name in SEGMENTS),
            initial_weights={name: hash_bytes(data) for name, data in weights.items()},
            programs=programs,
            frozen_programs={engine: {name: program.blob for name, program in frozen.items()}},
            stages=tuple(stages),
            blobs={digest: len(data) for digest, data in blobs.items()},
            versions={},
        )
        return manifest, blobs | {hash_bytes(manifest.to_json()): manifest.to_json()}


def tensors(specs) -> tuple[Tensor, ...]:
    return tuple(Tensor(spec.name, spec.shape, spec.dtype) for spec in specs)


def segment_file(name: str, path: Path) -> SegmentFile:
    return SegmentFile(name, str(path), tensors(make_segment(name).tensors))


def rows_of(file: RowFile) -> Rows:
    return Rows(str(file.path), file.offset, file.source, file.identity)


def make_job(**changes) -> Job:
    """A training job of the tiny model without files; the parts that a test is about are changed."""
    facts = {
        "phase": "train",
        "run": "r",
        "stage": 0,
        "round": 0,
        "device": "attic",
        "engine": "onnxruntime",
        "seed": 7,
        "objective": "supervised",
        "limits": {"label": CLASSES},
        "batch_size": MAX_BATCH,
        "micro_batch": MAX_BATCH,
        "local_epochs": 1,
        "learning_rate": 0.1,
        "optimizer": SGD(momentum=0.9).model_dump(),
        "upload_encoding": "fp32",
        "upload_compression": "none",
        "programs": {},
        "active": (),
        "features": (),
        "keep_keys": (),
        "feature_encoding": "fp32",
        "feature_folder": "",
        "stored_examples": 0,
        "label": None,
        "examples": 21,
        "work_folder": "",
    }
    return Job(**(facts | changes))


def make_data(path: Path, train: int = 21, test: int = 10, seed: int = 0) -> Path:
    """An .npz with `train` + `test` examples of 3 classes that can be told apart."""
    random = np.random.default_rng(seed)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        label = random.integers(0, CLASSES, count)
        arrays[f"{split}_label"] = label.astype(np.int64)
        noise = random.normal(size=(count, CHANNELS, SAMPLES)) * 0.3
        arrays[f"{split}_motion"] = (noise + label[:, None, None]).astype(np.float32)
    np.savez(path, **arrays)
    return path


def export_program(engine: str, role: str, segments: list[str]) -> bytes:
    """One program file as `lamina.bundles.manifest` defines it: a pure function (weights..., inputs...)."""
    import io

    import torch
    from torch.export import Dim
    from torch.export.experimental import _export_forward_backward
    from torch.fx.experimental import _config as symbolic_shapes

    from export.ops.lean_compilers import lean_onnx, lean_torch, lean_xnnpack

    specs = [spec for name in segments for spec in make_segment(name).tensors]
    values = [torch.randn(spec.shape) for spec in specs]
    kinds = [kind_of(name) for name in segments]
    inputs = [torch.randn(2, *(RAW if "stem" in kinds else FEATURES).shape)]
    if role != "frozen":
        inputs.append(torch.randint(CLASSES, (2,)))
    batch = Dim("batch", min=1, max=MAX_BATCH)

    class Owner(torch.nn.Module):  # parameters inside, as `_export_forward_backward` wants them
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(values)

        def forward(self, *inputs):
            return run_segments(segments, list(self.weights), *inputs)

    class Pure(torch.nn.Module):
        def __init__(self, function) -> None:
            super().__init__()
            self.function = function

        def forward(self, *arrays):
            return tuple(self.function(*arrays))

    def export(module, arrays, weights: int):
        shapes = {name: (*[None] * weights, *[{0: batch}] * len(inputs)) for name in ("inputs", "arrays")}
        name = "inputs" if isinstance(module, Owner) else "arrays"
        return torch.export.export(module, tuple(arrays), dynamic_shapes={name: shapes[name]})

    with warnings.catch_warnings(), symbolic_shapes.patch(backed_size_oblivious=True), lean_torch():
        warnings.simplefilter("ignore")
        if role == "train" and engine != "torch":
            function = _export_forward_backward(export(Owner(), inputs, 0)).graph_module
        else:
            count = len(values)

            def function(*arrays):
                return run_segments(segments, arrays[:count], *arrays[count:])

        program = export(Pure(function), [*values, *inputs], len(values))
        if engine == "torch":
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            return buffer.getvalue()
        if engine == "onnxruntime":
            with lean_onnx():
                exported = torch.onnx.export(program, (), dynamo=True, opset_version=20, verbose=False)
            exported.model_proto.ir_version = 10
            return exported.model_proto.SerializeToString()
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
        with lean_xnnpack():
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner(force_non_static_weights_for_f32_linear=True)],
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            )
            return bytes(edge.to_executorch(config).buffer)
