"""Compiled programs are kept where they should be, found again, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_runs import write_gin

from flix_jax import cli, compilation_cache

SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """As in a process of a user who has set nothing, and all as it was afterwards."""
    names = [name.lower() for name in SETTINGS]
    before = [getattr(jax.config, name) for name in names]
    for name in SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def folder():
    return jax.config.jax_compilation_cache_dir


def test_by_default_it_is_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.use(None) is None
    path = Path(folder())
    assert path.parent == tmp_path / "flix_jax" / "compiled" and path.is_dir()
    # Processes that are started have it from the environment.
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == folder()
    assert int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) == compilation_cache.MOST


def test_the_users_own_variable_goes_before(monkeypatch):
    before = folder()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert compilation_cache.use(None) is None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    assert folder() == before  # JAX has read the variable itself


def test_the_flag_goes_before_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    compilation_cache.use(str(tmp_path))
    assert Path(folder()).parent == tmp_path
    compilation_cache.use("none")
    assert folder() is None and os.environ["JAX_COMPILATION_CACHE_DIR"] == ""


def test_hosts_of_other_instructions_have_folders_of_their_own(tmp_path, monkeypatch):
    found = set()
    for flags in ("flags\t: avx avx2", "flags\t: avx2 avx", "flags\t: avx avx512f"):
        monkeypatch.setattr(Path, "read_text", lambda _, flags=flags: f"processor: 0\n{flags}\n")
        compilation_cache.use(str(tmp_path))
        found.add(folder())
    assert len(found) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for given in ("file", "file/in"):
        line = ["evaluate", f"--run_dir={tmp_path}", f"--compilation_cache={tmp_path / given}"]
        assert cli.main(line) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: --compilation_cache={tmp_path / given} cannot be written: ")
        assert told.count("\n") == 1
    # The default is no more than a help.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "not kept for the next start" in compilation_cache.use(None)
    assert folder() is None


def test_a_bucket_of_another_kind(tmp_path, capsys):
    line = ["evaluate", f"--run_dir={tmp_path}", "--compilation_cache=s3://bucket/x"]
    assert cli.main(line) == 2
    assert "s3://bucket/x: a folder is local or in a bucket of Google's" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    write_gin(tmp_path)
    environment = {name: text for name, text in os.environ.items() if name not in SETTINGS}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def start(run_dir):
        command = [sys.executable, "-m", "flix_jax.cli", "train", "--gin_file=run.gin"]
        command += ["--gin.DATA_DIR='data'", f"--run_dir={run_dir}", "--compilation_cache=kept"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return {path.name for path in (tmp_path / "kept").rglob("*-cache")}

    def losses(run_dir):
        found = (tmp_path / run_dir / "metrics.jsonl").read_text().splitlines()
        return [line.partition('"loss"')[2][:20] for line in found]

    first = start("a")
    assert any(name.startswith("jit_step-") for name in first)
    assert start("b") == first
    assert losses("a") == losses("b") != []
