"""The cost report: what a plan costs one device, stage by stage and over the run, beside end-to-end training.

Every figure stands twice, with and without the heads (projections and task head), because the heads can outweigh the layers.
FLOPs are multiply-accumulates for one sample: 3 x the forward pass of what is trained, 1 x that of what is frozen. docs/cost.md
has the conventions; `export.cost.estimate` makes the records. Needs no torch.
"""

import json
from collections.abc import Iterable
from math import prod
from typing import Annotated, Literal

from pydantic import Field

from lamina.encoding.tensors import Encoding, stored_tensors
from lamina.names import TensorShape
from lamina.record import Record

Count = Annotated[int, Field(ge=0)]
_DTYPE_BYTES = {"F32": 4, "F16": 2, "I8": 1}


class Accounting(Record):
    """What is counted as a round's cost.

    `frozen_weights`: devices keep the frozen segments (`resident`), or fetch those that they use in every round (`downloaded`:
    each device takes part once). `layer_budget` is depth dropout (Federated Layer-wise Learning): so many layers of an
    encoder are in use in a round, the active ones among them; the first frozen layer always is, the others are drawn anew for
    each round, and the figures are the expectation over the draws. Without `file_headers`, bytes are those of the values
    alone, as papers count them.
    """

    frozen_weights: Literal["resident", "downloaded"] = "resident"
    layer_budget: Annotated[int, Field(ge=2)] | None = None
    download_encoding: Encoding = "fp32"
    upload_encoding: Encoding = "fp32"
    file_headers: bool = True


class SegmentCost(Record):
    """One segment. `statistics` are values that are exchanged but not trained, such as batch norm's running means."""

    name: str
    is_head: bool
    parameters: Count
    statistics: Count
    stored_bytes: Count
    """Parameters and all buffers, as torch stores them."""
    forward_macs: Count
    constants: Count = 0
    """Parameters with `requires_grad=False`: never trained, and fetched once, as float32."""
    uncounted: tuple[str, ...] = ()
    """Operators of the forward pass that do dense arithmetic and that torch's counter does not know."""


class StepCost(Record):
    """What a stage costs one device, for one sample and for one round."""

    active_parameters: Count
    frozen_parameters: Count
    active_bytes: Count
    """Trained and exchanged segments as float32, with their statistics."""
    frozen_bytes: Count
    """The frozen prefix and the constants of the active segments as float32."""
    model_bytes: Count
    """All of the model that exists in this stage, as torch stores it: active, frozen, parts that are never used, and buffers of
    every type."""
    training_flops_per_sample: Count
    """3 x the forward pass of the active segments, or 4 x (`lamina.plans.plan.Plan.passes_of_a_step`)."""
    prefix_flops_per_sample: Count
    """1 x the frozen segments: added in every step without the feature cache."""
    fill_flops_per_sample: Count | None
    """With the feature cache: 1 x the segments frozen since the cache was last extended, once for each stored view of a sample.
    Devices that fetch the frozen segments in every round pay for the whole prefix, in every round. None with depth dropout,
    whose draws a cache cannot follow."""
    round_bytes_down: Count
    round_bytes_up: Count
    prefix_bytes_down: Count
    """The whole frozen prefix in the download encoding, and the constants of all segments as float32: what a device that joins
    in this stage fetches once in addition."""
    new_prefix_bytes_down: Count
    """The part of it that was frozen, or attached, since the last stage with rounds: what a device that was there all along
    fetches once.
    0 where devices fetch the whole prefix in every round: it is in `round_bytes_down` then."""

    @property
    def round_bytes(self) -> int:
        return self.round_bytes_down + self.round_bytes_up

    @property
    def flops_per_sample(self) -> int:
        """A training step without the feature cache."""
        return self.training_flops_per_sample + self.prefix_flops_per_sample


class StageCosts(Record):
    """One stage, counted with and without heads."""

    index: Count
    rounds: Count
    active: tuple[str, ...]
    frozen: tuple[str, ...]
    with_heads: StepCost
    without_heads: StepCost


class RunCost(Record):
    """One device that takes part in every round. FLOPs are for one sample of its data, over all rounds and local epochs."""

    training_flops: Count
    prefix_flops: Count
    fill_flops: Count | None
    bytes_down: Count
    bytes_up: Count
    new_prefix_bytes_down: Count

    @property
    def bytes_moved(self) -> int:
        """The rounds' exchange, as the papers count it: without the prefix that is fetched once at a stage change."""
        return self.bytes_down + self.bytes_up

    @property
    def flops(self) -> int:
        """Without the feature cache."""
        return self.training_flops + self.prefix_flops

    @property
    def cached_flops(self) -> int | None:
        """With the feature cache, filling it included."""
        return None if self.fill_flops is None else self.training_flops + self.fill_flops


class Savings(Record):
    """How many times less than end-to-end training of the same model, over the run. None where the plan pays nothing at all."""

    communication: float | None
    """The rounds' exchange; both sides in the plan's encodings."""
    communication_with_prefix: float | None
    """The same, and the plan's side pays for the prefix weights that it fetches at stage changes."""
    communication_against_fp32: float | None
    """As `communication_with_prefix`, against end-to-end training that sends float32."""
    flops: float | None
    """Without the feature cache."""
    flops_cached_steps: float | None
    """Training steps from cached features alone."""
    flops_cached: float | None
    """With the feature cache, filling it included."""


class RunCosts(Record):
    """The whole run, counted one way."""

    plan: RunCost
    end_to_end: RunCost
    savings: Savings


class CostReport(Record):
    """What `lamina cost` prints."""

    name: str
    strategy: str
    accounting: Accounting
    local_epochs: Count
    views: Count
    segments: tuple[SegmentCost, ...]
    unused_parameters: Count
    """Parameters that belong to the model but to no segment: never run, trained or sent."""
    stages: tuple[StageCosts, ...]
    end_to_end: StageCosts
    """All segments trained and exchanged in every round, for as many rounds as the plan has."""
    with_heads: RunCosts
    without_heads: RunCosts


def file_bytes(tensors: Iterable[TensorShape], encoding: Encoding, *, with_header: bool = True) -> int:
    """Bytes of `lamina.encoding.tensors.encode` for tensors of these shapes, without making them."""
    stored = {name: part for spec in tensors for name, part in stored_tensors(spec, encoding).items()}
    size = {name: _DTYPE_BYTES[dtype] * prod(shape) for name, (dtype, shape) in stored.items()}
    if not with_header:
        return sum(size.values())
    header: dict[str, object] = {"__metadata__": {"encoding": encoding}}
    end = 0
    for name in sorted(stored, key=lambda key: (-_DTYPE_BYTES[stored[key][0]], key)):  # safetensors' order; offsets have digits
        dtype, shape = stored[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size[name]]}
        end += size[name]
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + end
