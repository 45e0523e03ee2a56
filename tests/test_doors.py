"""The import rules of the house, read off the source: who may import whom, and who may import torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("lamina", "export", "coordinator", "edge_client", "benchmarks")
MAY_IMPORT = {
    "lamina": {"lamina"},
    "export": {"lamina", "export"},
    "coordinator": {"lamina", "coordinator"},
    "edge_client": {"lamina", "edge_client"},
    "benchmarks": set(ROOMS),
}
HEAVY = {
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "executorch",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "matplotlib",
}
# Each engine's file holds its runtime; that of ExecuTorch calls native libraries and imports nothing.
ENGINE_FILES = {
    "edge_client/engines/torch.py": {"torch"},
    "edge_client/engines/executorch.py": set(),
    "edge_client/engines/onnxruntime.py": {"onnxruntime"},
}
MAY_USE = {
    "lamina": set(),
    "export": {"torch", "onnx", "onnxscript", "onnxruntime", "executorch"},
    "coordinator": {"fastapi", "starlette", "uvicorn", "sqlalchemy"},
    "edge_client": set(),
    "benchmarks": HEAVY,
}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level package, whether the import runs when the file is imported) for each import of a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(((node.module or "").split(".")[0], id(node) not in inside))
    return found


def test_the_walk_sees_every_room() -> None:
    assert len(FILES) > 60
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_opens_only_the_doors_of_its_room(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    room = path.relative_to(ROOT).parts[0]
    is_command = name.startswith("lamina/cli/") or name == "lamina/api.py"

    for package, is_eager in imports(path):
        if package in ROOMS:
            assert package in MAY_IMPORT[room] or (is_command and not is_eager), f"{name} imports the room {package}"
        if package in HEAVY:
            allowed = MAY_USE[room] | ENGINE_FILES.get(name, set())
            assert package in allowed, f"{name} imports {package}"


def test_engine_runtimes_stay_out_until_an_engine_is_chosen() -> None:
    """No file of the client imports an engine's own file when it is itself imported."""
    for path in sorted((ROOT / "edge_client").rglob("*.py")):
        tree = ast.parse(path.read_text())
        eager = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        for node in eager:
            assert (node.module or "") not in {name[:-3].replace("/", ".") for name in ENGINE_FILES}, path
