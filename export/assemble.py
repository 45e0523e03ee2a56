"""Assembling: final weights -> a plain model to deploy, from raw inputs to logits, embeddings or features, for three runtimes.

    model.safetensors, model.pt    the state dict of the PyTorch model (`export.models.models.MultimodalModel`, or the user's)
    model.onnx                     weights inside, any batch size
    model.pte                      weights inside, batch 1..batch_size of the plan
    model.json                     the description of the model: what `export.models.models.build_model` takes

A supervised model gives logits, a contrastive one normalised embeddings, a self-supervised one the pooled features (batch,
width) before its heads, which are for training alone: the state dict still has them, the two programs do not. The three are run
on the same inputs before the function returns.
"""

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.graphs.cut import find_pools, find_segments
from export.graphs.trace import allow_batches, traced_batch
from export.inputs import example_inputs, raw_input
from export.lowering.lower_onnx import OPSET, serialize
from export.models.models import build_model
from export.models.parameters import in_order, trained
from export.objectives.fusions import classify
from export.objectives.objectives import l2_normalise
from export.ops.lean_compilers import lean_onnx, lean_torch, lean_xnnpack
from export.ops.quiet import quiet
from export.ops.rewrites import plain_operations
from lamina.bundles.manifest import Manifest
from lamina.encoding.tensors import Float32
from lamina.errors import ConfigError, ParityError, TensorFileError
from lamina.files import write_durably
from lamina.plans.model import ModelDescription, SelfSupervised, Supervised
from lamina.plans.plan import Plan
from lamina.plans.segments import HEAD, layer, norm, projection, stem

_MANY = 1 << 16  # ONNX plans no memory for the largest batch
_LEAST_MAX = (
    3  # with a batch of at most 2, the ExecuTorch compiler makes programs for exactly 2 (export/lowering/lower_executorch.py)
)
TOLERANCE = 1e-4  # between runtimes, over the whole depth of the model


@dataclass(frozen=True)
class AssembledModel:
    """Where the files are, and what they gave for the inputs that they were compared on.

    `outputs` has (logits,), the embeddings or the features by "torch", "onnx" and "executorch"; `max_difference` is the largest
    difference of any output between PyTorch and one of the other two.
    """

    description: ModelDescription
    safetensors: Path
    state_dict: Path
    onnx: Path
    pte: Path
    outputs: Mapping[str, tuple[Float32, ...]]
    max_difference: float


def assemble(
    manifest: Manifest,
    weights: Mapping[str, Mapping[str, Float32]],
    folder: Path,
    *,
    model: nn.Module | None = None,
    inputs: Sequence[NDArray[np.generic]] | None = None,
) -> AssembledModel:
    """Writes the model with these weights (segment -> tensor name -> array), and checks the files against PyTorch.

    Tensors that are never trained may be among the weights; without them, they are the model's own.
    `model` is the module that was exported, if it was not the plan's own. `inputs` are raw inputs in the order of the
    modalities to compare on; without them, random ones. Layers that the last stage does not have are left out.
    Raises TensorFileError for weights that are not the manifest's, and ParityError if a file predicts something else.
    """
    description = attached_model(manifest.plan)
    whole = _with_layers(model, description) if model is not None else build_model(description, manifest.plan.seed)
    load_weights(whole, description, weights)
    network = _Network(whole, description)
    specs = tuple(raw_input(encoder) for encoder in description.encoders)
    max_batch = manifest.plan.training.batch_size
    example = example_inputs(description, specs, batch=2)
    given = example if inputs is None else tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs)
    if len(given) != len(specs) or any(tuple(x.shape[1:]) != s.shape for x, s in zip(given, specs, strict=False)):
        raise ConfigError(
            f"inputs must have shapes {[('batch', *s.shape) for s in specs]}, given {[tuple(x.shape) for x in given]}"
        )

    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"model.{name}" for name in ("safetensors", "pt", "onnx", "pte", "json")}
    state = {key: value.contiguous() for key, value in whole.state_dict().items()}
    save_file(state, files["safetensors"])
    torch.save(state, files["pt"])
    write_durably(files["json"], description.to_json())
    with quiet():
        write_durably(files["onnx"], _to_onnx(network, example, description))
        write_durably(files["pte"], _to_executorch(network, example, max(_LEAST_MAX, max_batch)))
    outputs = _run_all(network, given, files, max_batch)
    return AssembledModel(
        description=description,
        safetensors=files["safetensors"],
        state_dict=files["pt"],
        onnx=files["onnx"],
        pte=files["pte"],
        outputs=outputs,
        max_difference=_largest_difference(outputs),
    )


def attached_model(plan: Plan) -> ModelDescription:
    """The model as it is in the last stage: a layer that no stage attached is not part of it."""
    last = plan.stages[-1]
    return plan.model.model_copy(
        update={
            "encoders": tuple(
                encoder.first(sum(layer(encoder.modality, i) in (*last.active, *last.frozen) for i in range(encoder.layers)))
                for encoder in plan.model.encoders
            )
        }
    )


class _Network(nn.Module):
    """Raw inputs -> (logits,), or one normalised embedding or pooled features for each modality, for any model that can be
    cut."""

    def __init__(self, model: nn.Module, description: ModelDescription) -> None:
        super().__init__()
        found = find_segments(model, description)
        self.has_projections = not isinstance(description.objective, SelfSupervised)
        used = {
            m: [stem(m), *(layer(m, i) for i in range(description.encoder(m).layers)), norm(m)] for m in description.modalities
        }
        names = [name for chain in used.values() for name in chain]
        names += [projection(m) for m in description.modalities] * self.has_projections
        names += [HEAD] * (HEAD in found)
        position = {name: index for index, name in enumerate(names)}
        self.segments = nn.ModuleList(found[name] for name in names)
        self.pools = nn.ModuleList(find_pools(model, description).values())
        self.routes = [([position[name] for name in used[m]], position.get(projection(m))) for m in description.modalities]
        self.head = position.get(HEAD)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        embeddings = []
        for x, pool, (chain, projection_at) in zip(inputs, self.pools, self.routes, strict=True):
            for index in chain:
                x = self.segments[index](x)
            x = pool(x)
            embeddings.append(x if projection_at is None else self.segments[projection_at](x))
        if self.head is not None:
            return (classify(self.segments[self.head], embeddings),)
        return tuple(l2_normalise(z) for z in embeddings) if self.has_projections else tuple(embeddings)


def output_names(description: ModelDescription) -> list[str]:
    if isinstance(description.objective, Supervised):
        return ["logits"]
    what = "features" if isinstance(description.objective, SelfSupervised) else "embedding"
    return [f"{modality}_{what}" for modality in description.modalities]


def _with_layers(model: nn.Module, description: ModelDescription) -> nn.Module:
    """A copy of the user's model without the layers that the description lacks."""
    copy = deepcopy(model)
    for encoder in description.encoders:
        layers = copy.encoders[encoder.modality].layers
        copy.encoders[encoder.modality].layers = nn.ModuleList(list(layers)[: encoder.layers])
    return copy


def load_weights(model: nn.Module, description: ModelDescription, weights: Mapping[str, Mapping[str, Float32]]) -> None:
    """Puts weights (segment -> tensor name -> array) into a model. Raises TensorFileError for those of another one."""
    for name, module in find_segments(model, description).items():
        own = in_order(module)
        given = weights.get(name)
        if given is None:
            raise TensorFileError(f"there are no weights for segment {name}")
        if not set(trained(module)) <= set(given) <= set(own):
            raise TensorFileError(f"segment {name} has tensors {sorted(own)}, given {sorted(given)}")
        with torch.no_grad():
            for key, parameter in own.items():
                if key not in given:  # never trained, so the model has it as it is
                    continue
                if tuple(given[key].shape) != tuple(parameter.shape):
                    raise TensorFileError(f"{name}/{key} has shape {tuple(parameter.shape)}, given {tuple(given[key].shape)}")
                parameter.copy_(torch.from_numpy(np.array(given[key], dtype=np.float32)))


def _to_onnx(network: _Network, example: tuple[Tensor, ...], description: ModelDescription) -> bytes:
    with warnings.catch_warnings(), lean_torch(), lean_onnx():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            _trace(network, example, _MANY),
            (),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            external_data=False,
            input_names=list(description.modalities),
            output_names=output_names(description),
        )
    assert exported is not None
    return serialize(exported.model_proto)


def _to_executorch(network: _Network, example: tuple[Tensor, ...], max_batch: int) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with warnings.catch_warnings(), lean_torch(), lean_xnnpack():
        warnings.simplefilter("ignore")
        program = _trace(network, example, max_batch)
        return bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def _trace(network: _Network, example: tuple[Tensor, ...], max_batch: int) -> ExportedProgram:
    shapes = (tuple({0: traced_batch(max_batch)} for _ in example),)
    with plain_operations():
        program = torch.export.export(network.eval(), example, dynamic_shapes=shapes)
    allow_batches(program, max_batch)
    return program


def _run_all(
    network: _Network, inputs: tuple[Tensor, ...], files: Mapping[str, Path], max_batch: int
) -> dict[str, tuple[Float32, ...]]:
    """Outputs of PyTorch and of the two programs, run batch by batch."""
    import onnxruntime

    with quiet():
        from executorch.extension.pybindings import _C
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(files["onnx"]), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    program = _C._load_for_executorch(str(files["pte"]))
    parts: dict[str, list[list[Float32]]] = {"torch": [], "onnx": [], "executorch": []}
    for start in range(0, len(inputs[0]), max_batch):
        batch = tuple(x[start : start + max_batch].contiguous() for x in inputs)
        with torch.no_grad():
            parts["torch"].append([y.numpy() for y in network(*batch)])
        parts["onnx"].append(session.run(None, {n: x.numpy() for n, x in zip(names, batch, strict=True)}))
        with quiet():
            parts["executorch"].append([y.numpy() for y in program.run_method("forward", batch, clone_outputs=True)])
    return {kind: tuple(np.concatenate(ys) for ys in zip(*batches, strict=True)) for kind, batches in parts.items()}


def _largest_difference(outputs: Mapping[str, tuple[Float32, ...]]) -> float:
    """Raises ParityError if a program differs from PyTorch by more than TOLERANCE, relative to values above 1."""
    worst = 0.0
    for kind in ("onnx", "executorch"):
        for expected, given in zip(outputs["torch"], outputs[kind], strict=True):
            difference = float(np.abs(expected - given).max())
            worst = max(worst, difference)
            if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
                raise ParityError(
                    f"the {kind} file of the assembled model differs from PyTorch by {difference:.1e}, above {TOLERANCE:.0e}"
                )
    return worst
