"""What an installation holds: the package, tasks/ and configs/ inside it, and the command."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import flix_jax

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The files that a wheel would hold, built from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("flix_jax", "tasks", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "configs" / "models" / "deeper").mkdir(parents=True)
    (source / "configs" / "models" / "deeper" / "one.gin").write_text("A = 1\n")
    (source / "flix_jax" / "table.tsv").write_text("a\tb\n")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(target)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    return target / "flix_jax"


def test_modules_and_tasks_are_installed(installed):
    for folder, target in (("flix_jax", installed), ("tasks", installed / "tasks")):
        for path in (ROOT / folder).rglob("*.py"):
            assert (target / path.relative_to(ROOT / folder)).exists(), path


def test_every_gin_file_and_table_is_installed(installed):
    for path in (ROOT / "configs").rglob("*.gin"):
        assert (installed / path.relative_to(ROOT)).exists(), path
    assert (installed / "configs" / "models" / "deeper" / "one.gin").exists()
    assert (installed / "table.tsv").exists()


def test_an_installed_package_finds_its_tasks_and_configs(installed):
    code = (
        f"import sys; sys.path.insert(0, {str(installed.parent)!r});"
        "import flix_jax.tasks, flix_jax.gin_reader as c;"
        "print(flix_jax.__file__, c.find_file('configs/models/deeper/one.gin'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed.parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        str(installed / "__init__.py"),
        str(installed / "configs/models/deeper/one.gin"),
    ]


def test_the_version_is_the_one_that_was_installed():
    assert metadata.version("flix_jax") == flix_jax.__version__
    assert f"## {flix_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {flix_jax.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_command_is_installed():
    scripts = metadata.entry_points(group="console_scripts")
    assert scripts["flix"].value == "flix_jax.cli:console"


def test_the_extras_are_there():
    extras = set(metadata.metadata("flix_jax").get_all("Provides-Extra"))
    assert {"tpu", "gpu", "gcs", "t5x", "test", "dev"} <= extras


def test_every_package_that_is_imported_is_a_dependency():
    """Nothing works only because another dependency happens to bring it along."""
    required = {
        re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
        for requirement in metadata.requires("flix_jax") or []
        if "extra ==" not in requirement
    }
    provided = metadata.packages_distributions()
    bundled = {"tensorflow", "tensorflow_datasets"}  # with seqio, which fixes their versions
    # Peers that a module serves where they are installed.
    served = {"buckets.py": {"google"}, "huggingface.py": {"torch"}, "t5x_models.py": {"t5x"}}
    for path in [*(ROOT / "flix_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        modules = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        names = {module.partition(".")[0] for module in modules}
        for name in (
            names
            - {"flix_jax"}
            - bundled
            - served.get(path.name, set())
            - set(sys.stdlib_module_names)
        ):
            owners = {owner.lower().replace("_", "-") for owner in provided.get(name, [])}
            assert owners & required, f"{path.relative_to(ROOT)} imports {name}"


def test_importing_flix_jax_is_quick_and_needs_no_tensorflow():
    code = "import flix_jax, sys; assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
