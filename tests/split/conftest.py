"""The two bundles that all tests of split training share."""

from pathlib import Path

import pytest

from tests.split.house import export_once, make_plan


@pytest.fixture(scope="session")
def server_bundle(shared_folder: Path, program_cache: Path) -> Path:
    """The coordinator runs the high ends."""
    return export_once(make_plan(), "onnxruntime", shared_folder, program_cache)


@pytest.fixture(scope="session")
def device_bundle(shared_folder: Path, program_cache: Path) -> Path:
    """The device holds all, its frozen layers in int8. For torch, which needs no compiler: the graph is a large one."""
    return export_once(make_plan(party="device", frozen_precision="int8"), "torch", shared_folder, program_cache)
