"""What the doctor says of a model is what an export does with it, for models of a menu of right and wrong layers.

The doctor's verdict is compared with a whole export for the torch engine: reading, cutting, tracing, differentiating, parity
and the signed bundle; only the compilers of other engines are left out. A smaller sample is exported for ONNX Runtime,
compiler and all. LAMINA_MODELS=300 makes the sample of the slow test larger: some twenty minutes of one core.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from export.build import export_bundle
from export.faults.survey import examine
from export.plans.resolve import resolve
from lamina.errors import LaminaError
from lamina.names import EngineName
from tests.export.menu import MENU, STEMS

FEW = settings(
    max_examples=8,  # a model takes four seconds of one core
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MODELS = st.fixed_dictionaries(
    {
        "stem": st.sampled_from(list(STEMS)),
        "layers": st.lists(st.sampled_from(list(MENU)), min_size=1, max_size=3),
        "is_shared": st.sampled_from([False, False, False, True]),
        "strategy": st.sampled_from(["layerwise", "progressive", "end_to_end"]),
        "freeze_stems": st.booleans(),
    }
)


def write_plan(folder: Path, model: dict[str, object], training: dict[str, object] | None = None) -> str:
    made = {key: model[key] for key in ("stem", "layers", "is_shared") if key in model}
    others = {key: value for key, value in model.items() if key not in made}
    encoder = {"factory": "tests.export.menu:make", "arguments": made}
    plan = {"name": "any", "classes": 3, "rounds": [1] * (1 if model.get("strategy") == "end_to_end" else len(model["layers"]))}
    plan |= {"encoders": {"signal": encoder}, "training": {"batch_size": 4} | (training or {}), **others}
    (folder / "plan.json").write_text(json.dumps(plan))
    return str(folder / "plan.json")


def doctors_words(source: str, engine: EngineName) -> list[str]:
    """Why the plan cannot be exported; empty if it can."""
    try:
        read = resolve(source, check=False)
        found = examine(read.plan, read.model, (engine,), faults=read.faults)
    except LaminaError as error:
        return [error.message]
    return [f"{each.segment}: {each.reason}; {each.remedy}" for each in found if each.blocks(read.plan)]


def exporters_words(source: str, engine: EngineName, folder: Path, cache: Path) -> str:
    """As `doctors_words`, of an export."""
    try:
        read = resolve(source)
        export_bundle(read.plan, folder / "bundle", (engine,), model=read.model, cache=cache, workers=1, rewrites=read.rewrites)
    except LaminaError as error:
        return error.message
    return ""


def check_agreement(model: dict[str, object], engine: EngineName, cache: Path) -> None:
    with TemporaryDirectory() as name:
        source = write_plan(Path(name), model)
        doctor, exporter = doctors_words(source, engine), exporters_words(source, engine, Path(name), cache)
        assert bool(doctor) == bool(exporter), (
            f"{model}\ndoctor: {doctor or 'can be exported'}\nexport: {exporter or 'exported'}"
        )


@FEW
@given(model=MODELS)
def test_what_the_doctor_says_is_what_an_export_does(model, program_cache) -> None:
    check_agreement(model, "torch", program_cache)


@pytest.mark.slow
@settings(FEW, max_examples=int(os.environ.get("LAMINA_MODELS", "40")))
@given(model=MODELS)
def test_it_is_so_for_many_models(model, program_cache) -> None:
    check_agreement(model, "torch", program_cache)


@pytest.mark.slow
@settings(FEW, max_examples=15)
@given(model=MODELS)
def test_it_is_so_with_a_compiler(model, program_cache) -> None:
    check_agreement(model, "onnxruntime", program_cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", MENU)
def test_it_is_so_for_each_layer_of_the_menu(name, program_cache) -> None:
    check_agreement({"stem": "sigmoid", "layers": [name, "linear"]}, "torch", program_cache)
