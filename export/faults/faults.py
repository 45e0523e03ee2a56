"""What is wrong with a model: one walk over it that yields every fault, each with its reason and its way out.

An export and `lamina cost` raise the first, `lamina doctor` lists all; so the three cannot differ. Behind a segment that fails,
the walk goes on with random features of the promised shape. Everything is run in evaluation mode, on two random samples.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from export.faults.trace_errors import ONE_BATCH, explain, where
from export.inputs import example_inputs, features, raw_input
from export.objectives.fusions import classify
from lamina.errors import CutError, ExportError
from lamina.names import EngineName
from lamina.plans.model import ModelDescription, Supervised
from lamina.plans.plan import Stage
from lamina.plans.segments import HEAD, classifier, heads_of, norm, prefix_chain, projection

Segments = Mapping[str, nn.Module]
BATCH = 2
MAX_CONSTANT_BYTES = 1 << 20
"""Of the buffers of one segment, which every program that holds it carries."""
_TOLERANCE = 1e-4  # relative: far above rounding, far below what other samples or chance would do


@dataclass(frozen=True)
class Fault:
    """`where` is a segment, or a text in brackets for what is none. `message` says it in one line, for an export; without it
    the line is made of the other three. `engine` is the only one that has the fault, if not all have it."""

    where: str
    reason: str
    remedy: str
    message: str = ""
    engine: EngineName | None = None
    kind: type[ExportError] = CutError
    cause: Exception | None = field(default=None, compare=False)

    @property
    def error(self) -> ExportError:
        return self.kind(self.message or f"{self.where}: {self.reason}; {self.remedy}")


def fault_of(place: str, error: Exception, engine: EngineName | None = None) -> Fault:
    """The fault that an error tells of."""
    kind, message = (type(error), error.message) if isinstance(error, ExportError) else (CutError, "")
    return Fault(place, *explain(error), message, engine, kind, error)


def raise_first(faults: Iterable[Fault]) -> None:
    """Raises the error of the first fault, if there is one."""
    for fault in faults:
        raise fault.error from fault.cause


def model_faults(model: nn.Module, segments: Segments, pools: Segments, description: ModelDescription) -> Iterator[Fault]:
    """Every fault that can be seen without tracing, in the order in which an export meets them."""
    yield from tie_faults(segments)
    yield from _unowned(model, segments, pools)
    keys = {id(value): key for key, value in (*model.named_parameters(), *model.named_buffers())}
    unfit = set()
    for name, module in (*segments.items(), *((norm(modality), pool) for modality, pool in pools.items())):
        for fault in tensor_faults(name, module, keys):
            unfit.add(name)
            yield fault
    with _evaluating((*segments.values(), *pools.values())):
        yield from _shape_faults(segments, pools, description, unfit)


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode, and then each part as it was."""
    parts = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part in parts:
            part.training = True


def tie_faults(segments: Segments) -> Iterator[Fault]:
    """Segments that share a parameter, or the memory of one; one that is never trained stays equal by itself."""
    owners: dict[object, list[tuple[str, str]]] = {}
    trained = set()
    for name, module in segments.items():
        for key, value in module.named_parameters():
            owners.setdefault(memory_of(value), []).append((name, key))
            if value.requires_grad:
                trained.add(memory_of(value))
    told = set()
    for places in (places for memory, places in owners.items() if memory in trained):
        for name, key in places:
            others = [f"{other}/{its}" for other, its in places if (other, its) != (name, key)]
            if not others or name in told:
                continue
            told.add(name)
            is_between = any(other != name for other, _ in places)
            first, second, *_ = (f"{other}/{its}" for other, its in places)
            remedy = (
                "give each segment a parameter of its own, or let an export make copies that are trained apart, by the "
                "encoder's option copy_shared = true"
            )
            yield Fault(
                name,
                f"its parameter {key!r} is tied to {', '.join(others)}: "
                + ("frozen in one segment and trained in the other, it would not stay one" if is_between else "one memory"),
                remedy if is_between else "use one nn.Parameter under both names, or give each a memory of its own",
                f"{first} and {second} are one tied parameter: frozen in one segment and trained in the other it would not "
                f"stay one; {remedy}"
                if is_between
                else f"{first} and {second} are two parameters in one memory; use one nn.Parameter under both names",
            )


def memory_of(value: Tensor) -> object:
    """Equal for two parameters of which one changes with the other."""
    if value.numel() and value.device.type == "cpu" and value.layout == torch.strided:
        return value.data_ptr()
    return id(value), "without memory"


def tensor_faults(name: str, module: nn.Module, keys: Mapping[int, str] | None = None) -> Iterator[Fault]:
    """Parameters that no program takes, and buffers that no program can hold. `keys` are the names that messages use."""
    for key, value in module.named_parameters():
        advice = precision_advice(value)
        if advice is not None:
            known = (keys or {}).get(id(value), key)
            reason, remedy = advice
            yield Fault(name, f"parameter {key!r} {reason}", remedy, f"parameter {known!r} {reason}; {remedy}")
    yield from _buffer_faults(name, module, keys or {})


def precision_advice(value: Tensor) -> tuple[str, str] | None:
    """(reason, remedy) for a parameter that is not float32 on the CPU."""
    if value.dtype != torch.float32:
        return f"is {value.dtype}", "programs train float32: call model.float()"
    if value.device.type != "cpu":
        return f"is on {value.device}", "export reads weights on the CPU: call model.cpu()"
    return None


def _buffer_faults(name: str, module: nn.Module, keys: Mapping[int, str]) -> Iterator[Fault]:
    """Buffers are constants in evaluation mode, and programs hold small ones. Some are there to change."""
    size = 0
    for place, part in module.named_modules():
        for key, value in part.named_buffers(recurse=False):
            size += value.numel() * value.element_size()
            path = f"{place}.{key}".lstrip(".")
            known = keys.get(id(value), path)
            reason, remedy = "", ""
            if isinstance(part, _BatchNorm):
                reason = "is a running statistic, neither trained nor sent, so devices would disagree about it"
                remedy = "use LayerNorm or GroupNorm instead of BatchNorm"
            elif is_spectral_norm(part):
                reason = "is the spectral norm's estimate, which would stay as it is while the weights are trained"
                remedy = SPECTRAL_REMEDY
            elif value.is_complex() or value.layout != torch.strided or value.device.type != "cpu":
                what = value.dtype if value.is_complex() else value.layout if value.device.type == "cpu" else value.device
                reason = f"is {what}, and programs hold dense real tensors of the CPU"
                remedy = "keep real and imaginary parts in two dense buffers, and call model.cpu()"
            if reason:
                yield Fault(name, f"buffer {path!r} {reason}", remedy, f"buffer {known!r} {reason}; {remedy}")
                return
    if size > MAX_CONSTANT_BYTES:
        yield Fault(
            name,
            f"its buffers take {size:,} bytes, a program carries {MAX_CONSTANT_BYTES:,} bytes of constants at most",
            "compute them in forward() from torch.arange and the like, or make them parameters",
        )


SPECTRAL_REMEDY = (
    "fix the weights before the export with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') or "
    "torch.nn.utils.remove_spectral_norm(layer), or use weight_norm of torch.nn.utils.parametrizations"
)


def is_spectral_norm(module: nn.Module) -> bool:
    """Whether this is the parametrization, or a layer with the older hook."""
    hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    return type(module).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks


def _unowned(model: nn.Module, segments: Segments, pools: Segments) -> Iterator[Fault]:
    """Parameters of no segment."""
    for modality, pool in pools.items():
        if any(True for _ in pool.parameters()):
            yield Fault(
                norm(modality),
                "its pool has parameters, which no stage would train",
                "move them into `norm`",
                f"encoders[{modality!r}].pool has parameters, which no stage would train; move them into `norm`",
            )
    owned = {id(value) for module in (*segments.values(), *pools.values()) for value in module.parameters()}
    for key, value in model.named_parameters():
        if id(value) not in owned:
            yield Fault(
                f"(parameter {key})",
                "this parameter belongs to no segment: nobody would train or send it",
                "move it into a segment",
                f"parameter {key!r} belongs to no segment, so nobody would train or send it; move it into one",
            )


@torch.no_grad()
def _shape_faults(segments: Segments, pools: Segments, description: ModelDescription, unfit: set[str]) -> Iterator[Fault]:
    """Runs every segment on what the one before gives, but for those that are `unfit` to run."""
    output = description.projection.output
    embeddings = []
    for encoder in description.encoders:
        modality = encoder.modality
        (x,) = example_inputs(description, (raw_input(encoder),), BATCH)
        chain = [*prefix_chain(description, modality), norm(modality)]
        shapes = [features(encoder, min(depth, encoder.layers)).shape for depth in range(len(chain))]
        steps = [(name, name, segments[name], shape) for name, shape in zip(chain, shapes, strict=True)]
        pooled = f"encoders[{modality!r}].pool"
        steps.append((norm(modality), pooled, pools[modality], (encoder.width,)))
        steps.append((projection(modality), projection(modality), segments[projection(modality)], (output,)))
        for place, name, module, shape in steps:
            x = yield from _next(place, name, module, x, shape, place in unfit)
        embeddings.append(x)
        for name in heads_of(description, modality)[1:]:
            is_classifier = name == classifier(modality) and isinstance(description.objective, Supervised)
            promised = description.objective.classes if is_classifier else output
            yield from _next(name, name, segments[name], x, (promised,), name in unfit)
    if isinstance(description.objective, Supervised) and HEAD not in unfit:
        yield from _head_faults(segments[HEAD], embeddings, description.objective.classes)


def _next(
    place: str, name: str, module: nn.Module, x: Tensor, shape: Sequence[int], is_unfit: bool
) -> Generator[Fault, None, Tensor]:
    """Yields the faults of one segment; returns what the next one takes."""
    if not is_unfit:
        y, fault = look(place, name, module, x, shape)
        if fault is not None:
            yield fault
        if y is not None:
            return y
    return random_features(shape)


def _head_faults(head: nn.Module, embeddings: Sequence[Tensor], classes: int) -> Iterator[Fault]:
    """Our heads take the embeddings one by one, others side by side."""

    def run(joined: Tensor) -> Tensor:
        return classify(head, joined.split([z.shape[1] for z in embeddings], dim=1))

    yield from filter(None, [look(HEAD, HEAD, head, torch.cat(list(embeddings), dim=1), (classes,), run)[1]])


@torch.no_grad()
def look(
    place: str,
    name: str,
    module: nn.Module,
    x: Tensor,
    promised: Sequence[int] | None,
    run: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor | None, Fault | None]:
    """What a module gives for two samples, and what is wrong with it: it raises, gives no tensor or another one than `promised`
    (for one sample; None for any), changes its input or its buffers, or does not treat samples alike.

    There are no features where their shape is not known or not right, and random ones where their values are not to be used.
    `place` is the segment that the fault is told of, `name` what the message calls the module, `run` calls it.
    """
    run = run or module
    taken = x.clone()
    buffers = {key: (value, value._version) for key, value in module.named_buffers()}
    try:
        y = run(taken)
    except Exception as error:  # a user's layer may raise anything
        return None, _raised(place, name, x, error)

    def fault(reason: str, remedy: str) -> Fault:
        return Fault(place, f"it {reason}", remedy, f"{name} {reason}; {remedy}")

    if not isinstance(y, Tensor):
        wrap = "a segment takes one tensor and gives one: wrap it in a module whose forward() does so"
        return None, fault(f"gives a {type(y).__name__}, not a tensor", wrap)
    shape = tuple(y.shape)
    if y.ndim < 2 or shape[0] != len(x):
        batch = "keep the batch as the first axis of what forward() gives"
        return None, fault(f"gives shape {shape} for {len(x)} samples", batch)
    if promised is not None and shape != (len(x), *promised):
        agree = "make the two agree: change the layer, or the shapes in the plan"
        return None, fault(f"gives shape {shape} for {len(x)} samples, the plan promises {(len(x), *promised)}", agree)
    stand_in = random_features(shape[1:])
    if y.is_complex():
        return stand_in, fault(
            f"gives {y.dtype}, a complex tensor", "compute with real and imaginary parts as two tensors, and give a real one"
        )
    if y.layout != torch.strided:
        return stand_in, fault(f"gives a tensor of layout {y.layout}", "end forward() with .to_dense()")
    if y.dtype != torch.float32:
        return stand_in, fault(f"gives {y.dtype}, not torch.float32", "end forward() with .float()")
    if taken._version:  # torch counts the changes of each tensor
        return y, fault("changes its input in place", "write y = x + 1 instead of x += 1, and set inplace=False")
    for key, value in module.named_buffers():
        if key not in buffers or buffers[key][0] is not value or buffers[key][1] != value._version:
            return stand_in, fault(
                f"changes its buffer {key!r} in forward()",
                "a buffer is a constant in every program, on every device; use LayerNorm or GroupNorm instead of running "
                "statistics, and count outside of the model",
            )
    if not y.isfinite().all():
        return stand_in, fault(
            "gives NaN or infinity for random inputs",
            "keep logarithms, roots and quotients away from zero and below, such as by clamp(min=1e-6)",
        )
    fault_of_batch = _samples_alike(place, name, run, x, y)
    return y if fault_of_batch is None else stand_in, fault_of_batch


def random_features(shape: Sequence[int]) -> Tensor:
    """Two samples."""
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0))


def _samples_alike(place: str, name: str, run: Callable[[Tensor], object], x: Tensor, y: Tensor) -> Fault | None:
    """The fault that a sample alone gets something else than in `y`, beside another."""
    try:
        alone = run(x[:1].clone())
    except Exception as error:  # as in `look`
        reason, remedy = ONE_BATCH
        return Fault(place, f"{reason}{where(error)}", remedy, f"{name}: {reason}{where(error)}; {remedy}")
    if (isinstance(alone, Tensor) and _is_near(alone, y[:1])) or _reads_values(run, x):
        return None
    if not isinstance(alone, Tensor) or alone.shape != y[:1].shape:
        reason, remedy = ONE_BATCH
        return Fault(place, reason, remedy, f"{name}: {reason}; {remedy}")
    again = run(x.clone())
    if isinstance(again, Tensor) and not _is_near(again, y):
        reason = "it gives other values for the same input: it draws random numbers, or counts its calls"
        remedy = "remove that from forward(): noise belongs to the data, and dropout to nn.Dropout, which lamina turns off"
    else:
        reason = "it gives a sample other values where other samples are beside it"
        remedy = "take means, norms and softmax over the axes of one sample, never over the batch, which is the first axis"
    return Fault(place, reason, remedy, f"{name}: {reason}; {remedy}")


def _reads_values(run: Callable[[Tensor], object], x: Tensor) -> bool:
    """Whether code depends on the values of a tensor: tracing has the words and the line."""
    try:
        with _NoValues():
            run(x.clone())
    except _ValueReadError:
        return True
    return False


class _ValueReadError(Exception):
    pass


class _NoValues(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise _ValueReadError
        return function(*args, **(kwargs or {}))


def _is_near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= _TOLERANCE * max(1.0, float(other.abs().max()))


def _raised(place: str, name: str, x: Tensor, error: Exception) -> Fault:
    given, kind = f"an input of shape {tuple(x.shape)} and {x.dtype}", type(error).__name__
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return Fault(
        place,
        f"it raises {kind} for {given}: {line}{where(error)}",
        "let forward() take one such tensor and give one; the plan's input or features may also be wrong",
        f"{name} cannot take {given}: {kind}: {error}",
        cause=error,
    )


@torch.no_grad()
def run_segment(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """What a segment gives. Raises CutError that names it, whatever its forward() raises, and if it gives no tensor."""
    try:
        y = module(x)
    except Exception as error:  # a user's layer may raise anything
        raise _raised(name, name, x, error).error from error
    if not isinstance(y, Tensor):
        raise CutError(f"{name} gives a {type(y).__name__}; a segment takes one tensor and gives one: wrap it in a module")
    return y


def end_faults(segments: Segments, pools: Segments, description: ModelDescription, stage: Stage) -> Iterator[Fault]:
    """Where a stage ends, norm, pool and projection must take what its last layer gives, in the middle of the model too."""
    place = f"(stage {stage.index})"
    for modality in description.modalities:
        encoder = description.encoder(modality)
        depth = len(stage.frozen_chain(description, modality)) + len(stage.active_chain(description, modality)) - 1
        if encoder.feature_shape(depth) == encoder.feature_shape(encoder.layers):
            continue  # `model_faults` ran it
        x = torch.zeros(BATCH, *encoder.feature_shape(depth))
        about = f"stage {stage.index} ends with features {encoder.feature_shape(depth)} of {modality}, and "
        try:
            for name, module in ((norm(modality), segments[norm(modality)]), (f"{modality}.pool", pools[modality])):
                x = run_segment(about + name, module, x)
        except CutError as error:
            yield fault_of(place, error)
            continue
        if tuple(x.shape) != (BATCH, encoder.width):
            made, wanted = tuple(x.shape), (BATCH, encoder.width)
            reason = f"{modality}.pool makes {made} of {BATCH} samples, but the heads, which all stages share, take {wanted}"
            remedy = "give a pool that makes one width after every layer (fill up with zeros), or use the strategy end_to_end"
            yield Fault(place, about + reason, remedy, f"{about}{reason}: {remedy}")
