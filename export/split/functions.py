"""Which programs a split plan needs, and of what each is made: parts, inputs and outputs by name."""

from collections.abc import Mapping

from torch import nn

from export.models.models import Layer
from export.split.graphs import (
    SplitFunction,
    classified,
    device_step,
    gradients_of_input_and_weights,
    gradients_of_logits,
    gradients_of_weights,
    transferred,
)
from export.split.modules import Classify, ClassifyAndTransfer, DeviceStep, HighEnd, LowEnd, LowPrefix
from lamina.names import LABEL
from lamina.plans.model import TextTokens
from lamina.plans.segments import TensorSpec, classifier, layer, norm, stem
from lamina.split.manifest import program_names
from lamina.split.plan import FUSED, FUSION, LOGITS, SplitPlan, modality_adapter, task_adapter

_METRICS = ("loss", "fused_loss", "correct", "fused_correct")


def split_functions(plan: SplitPlan, parts: Mapping[str, nn.Module]) -> list[SplitFunction]:
    """Every program of the plan (`lamina.split.manifest.program_names`)."""

    def tensors_of(name: str) -> tuple[str, ...]:
        return tuple(f"{name}/{key}" for key, _ in parts[name].named_parameters())

    def prefix(m: str) -> SplitFunction:
        module = LowPrefix(parts[stem(m)], _block(parts[layer(m, 0)]), plan.adapter)
        return SplitFunction(f"{m}.prefix", "device", module, tuple(plan.low(m)), (m,), ("base", "branch"))

    found: list[SplitFunction] = []
    highs, adapters, heads = {}, {}, {}
    for m in plan.modalities:
        blocks = [_block(parts[layer(m, i)]) for i in range(1, plan.encoder(m).layers)]
        adapters[m], heads[m] = parts[modality_adapter(m)], parts[classifier(m)]
        highs[m] = HighEnd(parts[task_adapter(m)], blocks, parts[norm(m)])  # type: ignore[arg-type]
    fusion = parts[FUSION]
    if plan.party == "device":
        found += [prefix(m) for m in plan.modalities]
        names = [modality_adapter(m) for m in plan.modalities]
        names += [name for m in plan.modalities for name in (task_adapter(m), *plan.high(m))]
        names += [*(classifier(m) for m in plan.modalities), FUSION]
        inputs = (*(f"{m}.{which}" for m in plan.modalities for which in ("base", "branch")), LABEL)
        owners = [  # of each array that the program takes; an int8 matrix comes with its scales
            (name, f"{name}/{key}")
            for name in names
            for key, value in parts[name].named_parameters()
            for _ in range(2 if name in plan.frozen and plan.precision(name) == "int8" and value.ndim == 2 else 1)
        ]
        losses, correct = [f"{m}.loss" for m in plan.modalities], [f"{m}.correct" for m in plan.modalities]
        metrics = (*losses, "fused_loss", *correct, "fused_correct")
        for title, is_fused in (("step", False), ("step_transfer", True)):
            module = DeviceStep(plan, list(adapters.values()), list(highs.values()), list(heads.values()), fusion, is_fused)  # type: ignore[arg-type]
            trained = [place for place, (name, _) in enumerate(owners) if name in plan.sent(is_fused)]
            outputs = (*metrics, *(owners[place][1] for place in trained))
            found.append(SplitFunction(title, "device", module, tuple(names), inputs, outputs, device_step(trained)))
        module = found[-2].module
        found.append(
            SplitFunction(
                "answer",
                "device",
                module,
                tuple(names),
                inputs,
                metrics,
                lambda run, w, x: tuple(v.detach() for v in run(w, x)[1:]),
            )
        )
        return found
    for m in plan.modalities:
        ma, ta, head = modality_adapter(m), task_adapter(m), classifier(m)
        adapter, high = adapters[m], highs[m]
        low_count, high_count = len(tensors_of(ma)), len(tensors_of(ta))
        high_parts = (ta, *plan.high(m))
        outputs = (*_METRICS, "gradient", "logits_gradient", *tensors_of(head))
        found += [
            prefix(m),
            SplitFunction(f"{m}.low", "device", LowEnd(adapter), (ma,), ("base", "branch"), ("activations",)),  # type: ignore[arg-type]
            SplitFunction(
                f"{m}.low_backward",
                "device",
                adapter,
                (ma,),
                ("branch", "gradient"),
                tensors_of(ma),
                gradients_of_weights(low_count),
                (0,),
            ),
            SplitFunction(
                f"{m}.classify",
                "device",
                Classify(heads[m]),
                (head,),
                ("features", LOGITS, LABEL),
                outputs,
                classified,  # type: ignore[arg-type]
            ),
            SplitFunction(
                f"{m}.transfer",
                "device",
                ClassifyAndTransfer(heads[m], plan.transfer),
                (head,),  # type: ignore[arg-type]
                ("features", FUSED, LOGITS, LABEL),
                tuple(o for o in outputs if o != "logits_gradient"),
                transferred,
            ),
            SplitFunction(f"{m}.high", "server", high, high_parts, ("activations",), ("features",)),
            SplitFunction(
                f"{m}.high_backward",
                "server",
                high,
                high_parts,
                ("activations", "gradient"),
                ("gradient", *tensors_of(ta)),
                gradients_of_input_and_weights(high_count),
                (0,),
            ),
        ]
    found += [
        SplitFunction(FUSION, "server", fusion, (FUSION,), plan.modalities, (FUSED, LOGITS)),
        SplitFunction(
            "fusion_backward", "server", fusion, (FUSION,), (*plan.modalities, "gradient"), tensors_of(FUSION),
            gradients_of_logits, (1,),
        ),
    ]  # fmt: skip
    assert [function.name for function in found] == program_names(plan)
    return found


def input_spec(plan: SplitPlan, function: str, name: str) -> TensorSpec:
    """The shape, without the batch axis, of an input of a program."""
    m = function.partition(".")[0] if "." in function else name.partition(".")[0]
    if name == LABEL:
        return TensorSpec(name=name, shape=(), dtype="int64")
    if name == LOGITS or (function == "fusion_backward" and name == "gradient"):
        return TensorSpec(name=name, shape=(plan.classes,))
    if function.endswith(".prefix"):
        encoder = plan.encoder(m)
        is_text = isinstance(encoder.input, TextTokens)
        return TensorSpec(name="x", shape=encoder.input.shape, dtype="int64" if is_text else "float32")
    is_features = name in (FUSED, "features", *plan.modalities) or (function.endswith("high_backward") and name == "gradient")
    return TensorSpec(name=name, shape=(plan.width,) if is_features else (plan.encoder(m).input.tokens, plan.width))


def _block(module: nn.Module) -> Layer:
    assert isinstance(module, Layer)
    return module
