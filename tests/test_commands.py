"""The commands from end to end, as a user types them, on small files."""

import json

import pytest
from tiny_runs import write_gin

from flix_jax import cli

SWEEP = """
include 'run.gin'
SEED = 0
Run.seed = %SEED
Sweep.name = 'ranks'
Sweep.seeds = (0, 1)
Sweep.metric = 'exact_match'
Sweep.axes = {'rank': {'1': ('FeatureType.rank = 1',), '2': ('FeatureType.rank = 2',)}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_gin(tmp_path, sweep=SWEEP)


@pytest.mark.slow
def test_train_evaluate_and_infer(folder, capsys):
    flags = ["--gin_file=run.gin", "--gin.DATA_DIR='data'", "--run_dir=run"]
    assert cli.main(["train", *flags]) == 0
    shown = capsys.readouterr()
    assert "step 4 of 4" not in shown.out
    table = shown.err.split("examples by cell\n")[-1].splitlines()
    assert [line.split() for line in table[2:4]] == [["x", "4", "4"], ["y", "4", "held", "out"]]
    # Started again it has nothing left to do, and says where it stands.
    assert cli.main(["train", *flags]) == 0
    assert "step 4 of 4" in capsys.readouterr().err
    # The folder knows its config.
    assert cli.main(["evaluate", "--run_dir=run", "--cells=up/{x,y}"]) == 0
    table = capsys.readouterr().out
    assert "| seen cells " in table and "| unseen cells " in table and "† unseen cells" in table
    (folder / "in.jsonl").write_text('{"input": "ab", "task": "up", "language": "x"}\n')
    infer = ["infer", "--run_dir=run", "--input=in.jsonl", "--output=out.jsonl"]
    assert cli.main(infer) == 0
    assert "prediction" in json.loads((folder / "out.jsonl").read_text())
    # Another configuration is refused in one line.
    assert cli.main(["train", *flags, "--gin.FeatureType.rank=2"]) == cli.USER_ERROR
    error = capsys.readouterr().err.strip()
    assert "rank is 4 there and 2 here" in error and "\n" not in error


@pytest.mark.slow
def test_a_sweep_compares_its_trials_and_its_runs_stay_usable(folder, capsys):
    flags = ["--gin_file=sweep.gin", "--gin.DATA_DIR='data'", "--run_dir=sweep"]
    assert cli.main(["sweep", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("rank 1") > 1 and "standard error over seeds" in out
    for name in ("report.md", "comparison.csv", "comparison.svg", "comparison.png"):
        assert (folder / "sweep" / name).exists()
    assert len(list((folder / "sweep" / "bases").iterdir())) == 2  # one for each seed
    trial = next((folder / "sweep" / "trials").iterdir())
    assert cli.main(["evaluate", f"--run_dir={trial}"]) == 0
    # Nothing is trained again.
    before = {p: p.stat().st_mtime for p in (folder / "sweep").rglob("checkpoints/*")}
    assert cli.main(["sweep", *flags]) == 0
    assert {p: p.stat().st_mtime for p in (folder / "sweep").rglob("checkpoints/*")} == before
