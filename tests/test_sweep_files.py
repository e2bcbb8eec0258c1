"""Every shipped sweep file builds: its trials are runs, and those of a program what is meant."""

import pathlib

import pytest

from flix_jax import configuration
from flix_jax.experiments import together

SWEEPS = pathlib.Path(__file__).parent.parent / "configs" / "sweeps"
BABEL = sorted(path.name for path in SWEEPS.glob("babel_*.gin"))
OTHERS = sorted(path.name for path in SWEEPS.glob("*.gin") if f"babel_{path.name}" in BABEL)


def trials(files, flags=()):
    """(sweep, the run of every trial)."""
    sweep = configuration.load(files, flags).build("Sweep")
    runs = [
        configuration.load(files, [*flags, *trial.bindings, f"SEED={trial.seed}"]).build("Run")
        for trial in sweep.trials()
    ]
    return sweep, runs


@pytest.fixture(scope="module")
def babel_dir(tmp_path_factory):
    return f"BABEL_DIR='{tmp_path_factory.mktemp('babel')}'"


@pytest.mark.parametrize("name", BABEL)
def test_every_sweep_on_babel_builds(name, babel_dir):
    sweep, runs = trials([f"configs/sweeps/{name}"], [babel_dir])
    assert len({run.fingerprint() + str(run.evaluation) for run in runs}) == len(runs)
    for run in runs:
        split = run.split()
        assert split.train and split.held_out
    groups = together.programs(runs, sweep.trials_per_program)
    assert sorted(place for places in groups for place in places) == list(range(len(runs)))
    if sweep.trials_per_program == 1:
        assert len(groups) == len(runs)


@pytest.mark.parametrize("experiment", ["xtreme_up_tiny", "xtreme_up"])
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "mixtures.gin"])
def test_a_question_is_put_to_any_experiment(name, experiment):
    more = []
    if name == "ensembles.gin":
        more = ["FLIX_RANK=2", "CELL_RANK=4", "FLIX_LEARNING_RATE=0.1", "CELL_LEARNING_RATE=0.1"]
    if name == "flare.gin":
        more = ["JOINED='{source} {input}'", "JOINED_LENGTH=1024"]
    if experiment == "xtreme_up":
        more += ["BASE='mt5_base/checkpoint_1000000'", "VOCABULARY='sentencepiece.model'"]
    files = [f"configs/experiments/{experiment}.gin", f"configs/sweeps/{name}"]
    flags = ["DATA_DIR='nowhere'", "SEEDS=(0, 1)", *more]
    _, runs = trials(files, flags)
    assert len(runs) > 2 and {run.seed for run in runs} == {0, 1}
    bases = {run.base if isinstance(run.base, str) else run.base.fingerprint() for run in runs}
    assert len(bases) == 1


def test_one_task_of_babel_holds_out_the_cells_that_all_tasks_do(babel_dir):
    _, runs = trials(["configs/sweeps/babel_mixtures.gin"], [babel_dir, "SEEDS=(3,)"])
    one, many, *_ = (run.split() for run in runs)
    task = one.cells[0].task
    assert {cell.task for cell in one.cells} == {task}
    assert set(one.held_out) == {cell for cell in many.held_out if cell.task == task}
    assert set(one.train) == {cell for cell in many.train if cell.task == task}


def test_flare_is_two_stages_and_its_trials_differ_in_what_they_read(babel_dir):
    _, runs = trials(["configs/sweeps/babel_flare.gin"], [babel_dir, "SEEDS=(1,)"])
    assert len({run.base.fingerprint() for run in runs}) == 1
    english = runs[0].base
    assert english.source_text is None and english.adapters.fusion is None
    assert {cell.language for cell in english.split().train} == {"qpi"}
    assert english.base.trains_everything and english.inputs_length == 32
    for run in runs:
        fused = run.adapters.fusion is not None
        assert fused == (run.sources_length is not None)
        joined = run.source_text is not None and not fused
        assert run.inputs_length == (72 if joined else 32)
    assert sum(run.adapters.fusion is not None for run in runs) == 7
    assert sum(run.source_text is None for run in runs) == 3


@pytest.mark.parametrize("kind", ["lora", "flix"])
def test_flare_stands_behind_any_kind_of_adapter(kind, babel_dir):
    files = [f"configs/adapters/{kind}.gin", "configs/adapters/flare.gin"]
    flags = [babel_dir]
    experiment = "configs/experiments/babel_flare.gin"
    run = configuration.load([experiment, *files], flags).build("Run")
    assert run.adapters.fusion.function == "add_relu" and run.sources_length == 32
    real = configuration.load(
        ["configs/experiments/flare_real.gin", *files], ["DATA_DIR='nowhere'"]
    ).build("Run")
    assert real.base.adapters is None and real.base.source_text is None


def test_flare_on_real_data_builds():
    _, runs = trials(["configs/sweeps/flare_real.gin"], ["DATA_DIR='nowhere'"])
    assert len({run.fingerprint() for run in runs}) == len(runs) == 33
    assert len({run.base.fingerprint() for run in runs}) == 1
    groups = together.programs(runs, 16)
    assert sorted(map(len, groups)) == [3] * 11  # the seeds of a method
