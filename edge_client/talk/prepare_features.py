"""The part of a job that is about features: each modality's way to the active segments, and which stored features stay.

What a device keeps is the plan's choice (`lamina.plans.plan.FeatureStore.keep`). Features of other chains than this round's, as
depth dropout draws them, are deleted, but where the device has a fixed pool of draws for the stage: those that it has met so
far are noted beside the work folder's job, and stay.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_client import versions
from edge_client.job import SPLITS, Augmentation, FeaturePlan, FrozenStep, Split
from edge_client.rows.feature_encoding import row_dtype
from edge_client.rows.local_data import LocalData, limits_of
from edge_client.talk.program_files import Fetch, frozen_file, program_file, segment_file
from lamina.bundles.manifest import EngineName, Manifest
from lamina.encoding.tensors import hash_bytes
from lamina.errors import EngineError, ProtocolError
from lamina.files import write_durably
from lamina.plans.model import Encoder, ModuleEncoder
from lamina.plans.plan import FeatureStore
from lamina.wire import Assignment

Keys = tuple[tuple[str, ...], ...]
"""For each view, the cache key after each frozen step."""
_DRAWS = "draws.json"


@dataclass(frozen=True)
class Features:
    """What a job says of features. `stored` is how many examples of each split have theirs on disk."""

    plans: tuple[FeaturePlan, ...]
    keep_keys: tuple[tuple[str, ...], ...]
    stored: dict[Split, int]


@dataclass(frozen=True)
class FeatureWork:
    """An assignment, seen from the features: the encoders of the device's modalities and what its files hold."""

    work: Assignment
    manifest: Manifest
    data: LocalData
    fetch: Fetch
    engine: EngineName
    state: Path
    encoders: tuple[Encoder | ModuleEncoder, ...]

    @property
    def folder(self) -> Path:
        return self.state / "features"

    @property
    def store(self) -> FeatureStore:
        return self.manifest.plan.training.features

    def plan(self, split: Split, disk_bytes: int | None) -> Features:
        """Blobs are fetched only for what will run: of a chain, the segments whose features are not on disk yet.

        Raises ProtocolError for weights that the features need and the assignment lacks, EngineError if the bundle has no
        frozen programs for this engine.
        """
        chains = {encoder.modality: self.chain(encoder.modality) for encoder in self.encoders}
        stored = self._stored_examples(chains, disk_bytes)
        keys = {
            (encoder.modality, each): self._keys(encoder, each, chains[encoder.modality], stored[each])
            for encoder in self.encoders
            for each in SPLITS
        }
        taken = self._taken(max(len(keys[encoder.modality, split]) for encoder in self.encoders))
        plans = tuple(
            self._feature_plan(encoder, split, chains[encoder.modality], keys[encoder.modality, split], stored[split], taken)
            for encoder in self.encoders
            if self.data.examples(split)
        )
        return Features(plans, self._keep_keys([chain for views in keys.values() for chain in views]), stored)

    def chain(self, modality: str) -> list[str]:
        """The frozen segments that this device's features pass in this round, in order; none where all of them train.

        With depth dropout, the assignment has the weights of those that were drawn for it, and of no others.
        """
        plan, work = self.manifest.plan, self.work
        if work.phase == "calibrate":
            return []
        whole = plan.stages[work.stage].frozen_chain(plan.model, modality)
        chain = [name for name in whole if name in work.weights]
        is_drawn = plan.training.depth_dropout is not None and work.phase == "train"
        if chain != whole and not (is_drawn and chain[:2] == whole[:2]):
            lacking = next(name for name in whole if name not in chain)
            raise ProtocolError(f"the assignment of stage {work.stage} has no weights of {lacking}, which features pass")
        return chain

    def _stored_examples(self, chains: Mapping[str, Sequence[str]], disk_bytes: int | None) -> dict[Split, int]:
        """How many examples of each split have their features on disk, so that all files together stay within the budget.

        While one file is extended by a segment, its old and its new form exist: room for the largest file is kept free.
        """
        if self.store.keep == "none":
            return dict.fromkeys(SPLITS, 0)
        if disk_bytes is None:
            return {split: self.data.examples(split) for split in SPLITS}
        dropout = self.manifest.plan.training.depth_dropout
        draws = dropout.pool if dropout and dropout.pool and self.store.keep == "stage" else 1
        sizes: dict[Split, int] = {}
        largest = 0
        for split in SPLITS:
            row = 0
            for encoder in self.encoders:
                if chains[encoder.modality]:
                    depths = range(len(chains[encoder.modality]))
                    dtypes = [row_dtype(encoder.feature_shape(depth), self.store.encoding) for depth in depths]
                    dtype = max(dtypes, key=lambda each: each.itemsize)
                    row += self._views(encoder, split) * dtype.itemsize * (draws if split == "train" else 1)
                    largest = max(largest, dtype.itemsize * self.data.examples(split))
            sizes[split] = row * self.data.examples(split)
        needed = sum(sizes.values()) + largest
        share = min(1.0, disk_bytes / needed) if needed else 1.0
        return {split: int(self.data.examples(split) * share) for split in SPLITS}

    def _is_augmented(self, encoder: Encoder | ModuleEncoder, split: Split) -> bool:
        """Test examples are, too, where the objective is about augmented views."""
        plan = self.manifest.plan
        objective = plan.model.of_device(self.work.modalities).objective
        is_for_all = split == "train" or objective.kind == "self_supervised"
        return is_for_all and encoder.modality in plan.training.augmentation

    def _taken(self, count: int) -> set[int]:
        """The versions of `count` that this round takes."""
        plan, work = self.manifest.plan, self.work
        in_pairs = plan.model.of_device(work.modalities).objective.kind == "self_supervised"
        is_round = work.phase == "train"  # a calibration has no frozen segments
        epochs = versions.epochs_of(work.round, plan.training.local_epochs) if is_round else versions.EVALUATED
        return versions.of_epochs(epochs, count, in_pairs)

    def _views(self, encoder: Encoder | ModuleEncoder, split: Split) -> int:
        if not self._is_augmented(encoder, split):
            return 1
        return self.store.views if split == "train" else 2

    def _keys(self, encoder: Encoder | ModuleEncoder, split: Split, names: Sequence[str], stored: int) -> Keys:
        """The program is part of a key: the same weights in another graph, or in another engine, give other features."""
        plan, work = self.manifest.plan, self.work
        augmentation = plan.training.augmentation[encoder.modality] if self._is_augmented(encoder, split) else None
        steps = [(name, work.weights[name], self._frozen_program(name), *self._constants(name)) for name in names]
        views = []
        for view in range(self._views(encoder, split)):
            version = None if augmentation is None else [view, plan.seed, augmentation.model_dump()]
            facts = [self.data.fingerprint, encoder.modality, split, self.store.encoding, stored, version]
            depths = range(len(names))
            views.append(tuple(hash_bytes(json.dumps([facts, steps[: depth + 1]]).encode())[:40] for depth in depths))
        return tuple(views)

    def _keep_keys(self, present: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
        """Those of this round, and with a pool of draws also those that this device met before in this stage."""
        dropout = self.manifest.plan.training.depth_dropout
        if dropout is None or dropout.pool is None or self.store.keep != "stage":
            return tuple(present)
        note, stage = self.state / "work" / _DRAWS, [self.work.run, self.work.stage]
        known = json.loads(note.read_bytes()) if note.is_file() else {}
        earlier = [tuple(chain) for chain in known["chains"]] if known.get("stage") == stage else []
        chains = tuple(dict.fromkeys([*present, *earlier]))
        if len(chains) > len(earlier):
            write_durably(note, json.dumps({"stage": stage, "chains": chains}).encode())
        return chains

    def _feature_plan(
        self,
        encoder: Encoder | ModuleEncoder,
        split: Split,
        names: Sequence[str],
        keys: Keys,
        stored: int,
        taken: Collection[int],
    ) -> FeaturePlan:
        modality, manifest = encoder.modality, self.manifest
        # What is computed in part, or is not there, needs its segments; behind a whole file nothing does.
        is_whole = stored == self.data.examples(split)
        first_missing = min(self._depth(keys[version % len(keys)]) for version in taken) if is_whole else 0
        steps = []
        for place, name in enumerate(names):
            blob = self._frozen_program(name)
            program, segment = manifest.programs[blob], manifest.segment(name)
            if place >= first_missing:
                step = FrozenStep(
                    segment_file(segment, self.fetch(self.work.weights[name]), frozen_file(manifest, name, self.fetch)),
                    program_file(program, "frozen", self.fetch(blob)),
                    limits_of(manifest.plan.model).get(modality) if place == 0 else None,
                )
            else:
                step = FrozenStep(segment_file(segment, None), program_file(program, "frozen", None))
            steps.append(step)
        return FeaturePlan(
            modality=modality,
            rows=self.data.location(split, modality),
            steps=tuple(steps),
            keys=keys,
            augmentation=self._augmentation(encoder) if self._is_augmented(encoder, split) else None,
        )

    def _depth(self, keys: Sequence[str]) -> int:
        """How many steps are on disk; whether the file is undamaged, the trainer finds out."""
        depths = range(len(keys), 0, -1)
        return next((depth for depth in depths if any(self.folder.glob(f"{keys[depth - 1]}-*.npy"))), 0)

    def _augmentation(self, encoder: Encoder | ModuleEncoder) -> Augmentation:
        plan = self.manifest.plan
        found = plan.training.augmentation[encoder.modality]
        of_time = {"audio_frames": (0,), "sensor_windows": (-1,), "text_tokens": (0,), "values": (-1,)}
        axes = of_time.get(encoder.input.kind, (-2, -1))
        seed = int(hash_bytes(f"{plan.seed}/{encoder.modality}".encode())[:15], 16)
        return Augmentation(axes, found.shift, found.noise, found.flip, seed, found.erase, found.crop, found.gain)

    def _constants(self, name: str) -> list[str]:
        """What the features depend on besides the weights that the assignment names: the segment's frozen tensors."""
        return [self.manifest.frozen_tensors[name]] if name in self.manifest.frozen_tensors else []

    def _frozen_program(self, name: str) -> str:
        try:
            return self.manifest.frozen_programs[self.engine][name]
        except KeyError:
            run = self.manifest.plan.name
            raise EngineError(f"run {run!r} has no frozen program of {name} for {self.engine!r}") from None
