"""What a device holds for one stage: the inputs of the active segments and the model. Made once, used for all its rounds."""

from collections.abc import Callable, Mapping
from pathlib import Path

from edge_client.checks import limits_of
from edge_client.data import SPLITS, LocalData, Split
from edge_client.engines.base import Engine, LoadedProgram
from edge_client.feature_cache import FeatureCache, FrozenStep
from edge_client.progress import Say
from edge_client.rows import RowFile
from edge_client.stage_model import StageModel
from edge_client.train import Inputs
from lamina.errors import EngineError
from lamina.manifest import LABEL, Manifest, Program


class StageSession:
    """Features first, then the model: a frozen program and a training program are never in memory together."""

    def __init__(
        self,
        manifest: Manifest,
        stage: int,
        weights: Mapping[str, str],
        data: LocalData,
        engine: Engine,
        folder: Path,
        fetch: Callable[[str], Path],
        say: Say,
        on_chunk: Callable[[], None],
    ) -> None:
        model = manifest.plan.model
        chains: dict[str, list[FrozenStep]] = {}
        for modality in model.modalities:
            names = manifest.plan.stages[stage].frozen_chain(model, modality)
            chains[modality] = [_frozen_step(manifest, name, weights[name], engine) for name in names]
        cache = FeatureCache(folder, data.fingerprint, engine, fetch, say)
        cache.keep_only([(modality, split, chain) for modality, chain in chains.items() for split in SPLITS])
        self._inputs: dict[Split, Inputs] = {}
        for split in SPLITS:
            inputs: dict[str, RowFile] = {}
            if data.examples(split):
                for modality, chain in chains.items():
                    source = data.rows(split, modality)
                    inputs[modality] = cache.rows(modality, split, source, chain, limits_of(model), on_chunk)
                if model.objective.kind == "supervised":
                    inputs[LABEL] = data.rows(split, LABEL)
            self._inputs[split] = inputs
        cache.keep_only([(modality, split, chain) for modality, chain in chains.items() for split in SPLITS])

        def open_program(program: Program) -> LoadedProgram:
            return engine.load(fetch(program.blob), program)

        self.model = StageModel(manifest, stage, engine.name, open_program)

    def inputs(self, split: Split) -> Inputs:
        return self._inputs[split]

    def close(self) -> None:
        self.model.close()


def _frozen_step(manifest: Manifest, name: str, weights: str, engine: Engine) -> FrozenStep:
    try:
        program = manifest.programs[manifest.frozen_programs[engine.name][name]]
    except KeyError:
        raise EngineError(f"run {manifest.plan.name!r} has no frozen program of {name} for {engine.name!r}") from None
    return FrozenStep(manifest.segment(name), weights, program)
