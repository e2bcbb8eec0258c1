"""Who may import what, read from the source: what import-linter cannot see or does not express.

tasks/ becomes flix_jax.tasks on installation but lies outside the package's folder, and "only
these modules import seqio" is a rule about everybody else.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "flix_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
NAMES = {
    path: ".".join(
        ("flix_jax", *path.relative_to(ROOT).with_suffix("").parts)
        if path.is_relative_to(ROOT / "tasks")
        else path.relative_to(ROOT).with_suffix("").parts
    ).removesuffix(".__init__")
    for path in FILES
}
LIBRARIES = "flix_jax.data.libraries"  # the one that imports seqio and TensorFlow
# Modules of ours that may take them from there, at the top of the file or in a function.
MAY_USE_SEQIO = (
    "flix_jax.data.converter",
    "flix_jax.data.pipeline",
    "flix_jax.data.seqio_tasks",
    "flix_jax.data.vocabularies",
    "flix_jax.evaluation.evaluator",
    "flix_jax.evaluation.examples",
    "flix_jax.tasks.",
)
MAY_IMPORT_GIN = ("flix_jax.configuration", "flix_jax.gin_reader")
ADAPTERS_IMPORT = {"flax", "jax", "jaxtyping", "numpy"}
ABOVE_TASKS = ("cli", "configuration", "gin_reader", "experiments", "interop", "training")
BELOW_TASKS = ("flix_jax.adapters", "flix_jax.data", "flix_jax.models", "flix_jax.evaluation")


def imports(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Modules that a file imports, but for type checkers; only those at its top on request."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def outside(path: Path, **options: bool) -> set[str]:
    found = {module.partition(".")[0] for module in imports(path, **options)}
    return {name for name in found if name not in sys.stdlib_module_names and name != "flix_jax"}


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_only_the_named_modules_import_seqio_tensorflow_and_gin(path):
    name, found = NAMES[path], outside(path)
    if name != LIBRARIES:
        assert not found & {"seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text"}
    if not name.startswith(MAY_USE_SEQIO):
        assert LIBRARIES not in set(imports(path))
    if not name.startswith(MAY_IMPORT_GIN):
        assert "gin" not in found


@pytest.mark.parametrize("path", [p for p in FILES if "adapters" in p.parts], ids=lambda p: p.stem)
def test_adapters_import_the_array_libraries_only(path):
    assert outside(path) <= ADAPTERS_IMPORT
    assert all(
        module.startswith("flix_jax.adapters")
        for module in imports(path)
        if module.startswith("flix_jax.")
    )


@pytest.mark.parametrize(
    "path", [p for p in FILES if (ROOT / "tasks") in p.parents], ids=lambda p: p.stem
)
def test_tasks_import_downwards(path):
    above = tuple(f"flix_jax.{layer}" for layer in ABOVE_TASKS)
    assert not [module for module in imports(path) if module.startswith(above)]


@pytest.mark.parametrize(
    "path", [p for p in FILES if NAMES[p].startswith(BELOW_TASKS)], ids=lambda p: NAMES[p]
)
def test_nothing_below_imports_tasks(path):
    assert not [module for module in imports(path) if module.startswith("flix_jax.tasks")]


@pytest.mark.parametrize(
    "path", [p for p in FILES if (ROOT / "tasks") in p.parents], ids=lambda p: p.stem
)
def test_describing_a_source_of_cells_needs_no_tensorflow(path):
    assert LIBRARIES not in set(imports(path, everywhere=False))
