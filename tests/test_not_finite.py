"""Steps that are not finite: found, named, dumped, made again; or skipped, and counted."""

import collections
import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from test_training import arrays, data_state
from tiny_runs import make_base_run, write_gin, write_words

from flix_jax import cli
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.data.cells import Mixture
from flix_jax.experiments import diagnosis, dumps, parity, together, training
from flix_jax.experiments.job import Job
from flix_jax.experiments.replay import replay
from flix_jax.experiments.step_program import step_program
from flix_jax.training.not_finite import NotFinite
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.reporting import read_metrics

STEPS = 11
TYPES = (FeatureType("task", rank=2), FeatureType("language", rank=2, dropout=0.3))
LETTERS = [ord(letter) + 3 for letter in "def"]  # tokens that the inputs of language y alone have
TIMES = ("per_second", "data_wait", "device_memory")


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    return make_base_run(write_words(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def bad_base(base_run, tmp_path_factory):
    """A base that is well but for the embeddings of some letters."""
    folder = tmp_path_factory.mktemp("base")
    job = training.train(dataclasses.replace(base_run, total_steps=1), folder)
    template = job.parameters.state_template(job.optimizer())
    with job.checkpoints(None) as checkpoints:
        state, data = checkpoints.restore(template)
        table = state.trained["token_embedder"]["embedding"]
        trained = {
            **state.trained,
            "token_embedder": {"embedding": table.at[jnp.array(LETTERS)].set(jnp.inf)},
        }
        checkpoints.save(state.replace(step=state.step + 1, trained=trained), data)
    return str(folder)


@pytest.fixture(scope="module")
def run(base_run, bad_base):
    """Most batches of this run have no letter that the base cannot bear."""
    return dataclasses.replace(
        base_run,
        base=bad_base,
        mixture=Mixture(held_out=("up/x", "*/z"), rates={"*/x": 1.0, "*/y": 0.02}),
        adapters=AdapterSpec(FeatureSpace(TYPES), dropout=0.1),
        optimizer=Optimizer("adamw", Schedule(learning_rate=1e-2)),
        data_seed=28,  # in whose order the first of them is step 7
        total_steps=STEPS,
        save_every=2,
        log_every=3,
        keep=50,
    )


@pytest.fixture(scope="module")
def batches(run, tmp_path_factory):
    """The batches of the run, from step 1, and the names of their rows' cells by feature ids."""
    job = Job(run, tmp_path_factory.mktemp("unused"))
    pipeline = job.pipeline()
    found = []
    for step in range(STEPS):
        batch = pipeline.batch_at(step)
        names = []
        for row in batch["feature_ids"]:
            values = (t.values[i] for t, i in zip(job.space.types, row, strict=True))
            names.append("/".join(values))
        found.append((batch, names))
    return found


@pytest.fixture(scope="module")
def bad_steps(batches):
    return [
        step
        for step, (batch, _) in enumerate(batches, 1)
        if np.isin(batch["encoder_input_tokens"], LETTERS).any()
    ]


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(NotFinite) as error:
        training.train(run, folder)
    return folder, str(error.value)


def lines(run_dir):
    return [
        {name: value for name, value in line.items() if not any(t in name for t in TIMES)}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_the_line_says_step_cells_and_the_first_module(stopped, batches, bad_steps):
    folder, line = stopped
    step = bad_steps[0]
    assert 3 < step < STEPS  # or this tests little
    counts = sorted(collections.Counter(batches[step - 1][1]).items())
    cells = ", ".join(f"{name} {count}" for name, count in counts)
    assert line == (
        f"the loss is nan at step {step}, with {cells}; first not finite: the output of "
        f"token_embedder, whose inputs are finite; dumped in {folder / 'not_finite' / str(step)} "
        f"(flix diagnose --run_dir={folder})"
    )


def test_what_was_saved_before_stands_and_is_finite(stopped, bad_steps):
    folder, _ = stopped
    saved = sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
    assert saved == list(range(2, bad_steps[0], 2))
    for value in arrays(folder, saved[-1]).values():
        assert np.isfinite(value).all()


def test_the_dump_holds_the_batch_the_state_and_where_it_is_from(stopped, run, batches, bad_steps):
    folder, _ = stopped
    step = bad_steps[0]
    dump = dumps.folder_of(folder, step)
    stored = np.load(dump / "batch.npz", allow_pickle=False)
    batch, names = batches[step - 1]
    assert set(stored.files) == set(batch)
    for name in batch:
        np.testing.assert_array_equal(stored[name], batch[name])
    record = json.loads((dump / "step.json").read_text())
    assert record["step"] == step and record["metrics"]["loss"] == "nan"
    assert [example["cell"] for example in record["examples"]] == names
    first = (step - 1) * run.batch_size
    assert [x["position"] for x in record["examples"]] == list(range(first, first + 8))
    example = Job(run, folder).pipeline()._data[names[0]][record["examples"][0]["example"]]
    tokens = batch["encoder_input_tokens"][0]
    np.testing.assert_array_equal(tokens[tokens > 0], example["inputs"])
    assert "NOT FINITE" in (dump / "modules.txt").read_text()


def test_healthy_steps_made_again_have_the_very_numbers_of_the_log(stopped, run):
    folder, _ = stopped
    job = Job(run, folder)
    base = job.load_base()
    frozen, origin = job.frozen_parameters(base), job.base_digest(base)
    template = job.parameters.state_template(job.optimizer())
    program = step_program(job, template)
    pipeline = job.pipeline()
    with job.checkpoints(None, create=False, origin=origin) as checkpoints:
        made = [
            replay(job, checkpoints, pipeline, program, template, frozen, step)
            for step in (1, 2, 3)  # of which the last one begins at a checkpoint
        ]
    assert [step.problem for step in made] == [None] * 3
    (line,) = [x for x in lines(folder) if x["step"] == 3]
    for name in ("loss", "accuracy", "z_loss", "grad_norm"):
        assert sum(step.metrics[name] for step in made) / 3 == line[name]


@pytest.mark.exhaustive
def test_the_dumped_step_made_again_is_not_finite_in_the_same_place(stopped, run, bad_steps):
    folder, line = stopped
    found = diagnosis.diagnose(run, folder)
    assert found.replayed.step == bad_steps[0] and "not_finite" in found.source
    assert found.findings.first in line and found.cells in line
    table = (dumps.folder_of(folder, bad_steps[0]) / "modules.txt").read_text()
    assert found.findings.table() + "\n" == table
    with pytest.raises(ValueError, match="step 99: expected one of 1 to 11"):
        diagnosis.diagnose(run, folder, step=99)


@pytest.fixture(scope="module")
def skipping(run):
    return dataclasses.replace(run, not_finite="skip", save_every=1)


@pytest.fixture(scope="module")
def skipped(skipping, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipped")
    training.train(skipping, folder)
    return folder


def test_skipped_steps_leave_the_state_as_it_was_and_are_counted(skipped, bad_steps, batches):
    assert bad_steps
    for step in range(6, 9):
        before, after = arrays(skipped, step - 1), arrays(skipped, step)
        same = [before[name].tobytes() == after[name].tobytes() for name in before]
        assert all(same) == (step in bad_steps)
    counts = {x["step"]: x["skipped"] for x in lines(skipped) if "skipped" in x}
    for step, count in counts.items():
        assert count == sum(bad <= step for bad in bad_steps)
    tokens = [np.count_nonzero(b["decoder_target_tokens"]) for b, _ in batches]
    assert lines(skipped)[-1]["tokens"] == sum(tokens)
    assert all(np.isfinite(x["loss"]) for x in lines(skipped))


@pytest.mark.exhaustive
def test_a_run_with_skipped_steps_goes_on_bit_for_bit(skipping, skipped, bad_steps, tmp_path):
    stop = 9
    assert bad_steps == [7] and stop % skipping.log_every == 0
    rarely = dataclasses.replace(skipping, save_every=4)
    training.train(dataclasses.replace(rarely, total_steps=stop), tmp_path)
    training.train(rarely, tmp_path)
    for step in (8, STEPS):
        expected, got = arrays(skipped, step), arrays(tmp_path, step)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(value, got[name], err_msg=name)
        assert data_state(skipped, step) == data_state(tmp_path, step)
    assert lines(tmp_path)[-1] == lines(skipped)[-1]


@pytest.mark.exhaustive
def test_too_many_in_a_row_stop_the_run(skipping, tmp_path):
    everywhere = dataclasses.replace(
        skipping,
        mixture=Mixture(held_out=("up/x", "*/x", "*/z")),  # y alone
        seen_by_base=("back/x",),
        skips_in_a_row=2,
        log_every=10,
        save_every=20,
    )
    match = r"3 steps in a row are not finite: the last is step 3, with back/y \d, up/y \d; first"
    with pytest.raises(NotFinite, match=match):
        training.train(everywhere, tmp_path)
    assert dumps.steps(tmp_path) == [3]
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def changed_start(monkeypatch, change):
    """Changes the first values of a bank of adapters, for whoever asks."""
    initial = Job.initial_parameters

    def wrong(self, base, **given):
        trained, frozen = initial(self, base, **given)
        if self.run.adapters is not None:
            bank = trained["encoder"]["encoder"]["mlp"]["wi_0"]["flix"]["task"]
            bank["a"] = change(bank["a"])
        return trained, frozen

    monkeypatch.setattr(Job, "initial_parameters", wrong)


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(run, tmp_path, monkeypatch):
    # b is 0, so that the update is; the gradient of b, squared, is beyond float32.
    changed_start(monkeypatch, lambda a: a * 1e30)
    short = dataclasses.replace(run, base="random", save_every=1, microbatches=1)
    with pytest.raises(NotFinite, match="the norm of the gradient is inf at step 1, with"):
        training.train(short, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    record = json.loads((dumps.folder_of(tmp_path, 1) / "step.json").read_text())
    again = diagnosis.diagnose(short, tmp_path)
    assert again.replayed.metrics["loss"] == record["metrics"]["loss"] > 1  # to the bit
    largest = max(again.findings.gradients, key=lambda g: g.largest)
    assert largest.path == "encoder/encoder/mlp/wi_0/flix/task/b" and largest.largest > 1e28


@pytest.mark.exhaustive
def test_a_row_of_an_adapter_that_is_not_a_number_is_named(run, batches, tmp_path, monkeypatch):
    tasks = ("back", "up")  # the values, in their order
    changed_start(monkeypatch, lambda a: a.at[tasks.index("up")].set(jnp.nan))
    step = next(n for n, (_, names) in enumerate(batches, 1) if "up/y" in names)
    match = (
        rf"the loss is nan at step {step}, .*; first not finite: the output of "
        r"encoder/encoder/mlp/wi_0/flix\[0\], whose inputs are finite"
    )
    with pytest.raises(NotFinite, match=match):
        training.train(dataclasses.replace(run, base="random", save_every=50), tmp_path)


@pytest.mark.exhaustive
def test_an_update_that_is_too_large_is_never_saved(run, tmp_path):
    large = dataclasses.replace(
        run,
        base="random",
        optimizer=Optimizer("sgd", Schedule(learning_rate=1e39), clip_norm=None),
        save_every=1,
    )
    match = r"trained/.* is not finite after step 1, with .*; first not finite: trained/"
    with pytest.raises(NotFinite, match=match):
        training.train(large, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_the_choice_is_checked_and_may_change_where_a_run_stands(run):
    with pytest.raises(ValueError, match="Run.not_finite = 'skpi': .*did you mean 'skip'"):
        dataclasses.replace(run, not_finite="skpi")
    with pytest.raises(ValueError, match="Run.skips_in_a_row must be at least 1, got 0"):
        dataclasses.replace(run, skips_in_a_row=0)
    skip = dataclasses.replace(run, not_finite="skip")
    assert skip.fingerprint() == run.fingerprint()
    assert together.alone(skip) and not together.alone(run)


@pytest.mark.exhaustive
def test_parity_is_close_where_only_rounding_differs_and_refused_where_more_does(run, tmp_path):
    model = dataclasses.replace(run.model, dtype="bfloat16")
    rounded = dataclasses.replace(run, base="random", model=model, frozen_dtype="int8")
    job = Job(rounded, tmp_path)
    trained, frozen = job.initial_parameters(None)
    state = job.parameters.create_state(trained, job.optimizer())
    pipeline = job.pipeline()
    found = parity.measure(job, state, frozen, pipeline)
    assert 0 < abs(found.loss_difference) < 0.01 and 0 < abs(found.norm_difference) < 0.05
    assert re.match("parity of bfloat16, int8 with float32: loss ", found.line())
    found.check()
    layer = frozen["decoder"]["logits_dense"]
    layer["kernel_scale"] = layer["kernel_scale"] * 1.5
    wrong = parity.measure(job, state, frozen, pipeline)
    assert wrong.exact_loss == found.exact_loss
    with pytest.raises(ValueError, match="parity of .* rounding explains at most"):
        wrong.check()


@pytest.mark.slow
def test_the_command_line_stops_with_status_1_and_diagnoses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(write_gin(tmp_path))
    common = ["--gin_file=run.gin", "--gin.DATA_DIR='data'", "--gin.Run.log_every=1"]
    huge = ["--gin.Schedule.learning_rate=1e30", "--gin.Optimizer.name='sgd'"]
    huge += ["--gin.Run.base='random'", "--gin.Optimizer.clip_norm=None"]
    huge += ["--check_parity", "--run_dir=run"]
    assert cli.main(["train", *common, *huge]) == cli.DIVERGED
    said = capsys.readouterr().err
    assert "parity of float32 with float32: loss" in said
    (line,) = [x for x in said.splitlines() if x.startswith("error: ")]
    assert "at step 2, with " in line and "; first not finite: the " in line
    assert cli.main(["diagnose", "--run_dir=run"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("step 2, from run/not_finite/2\n") and "\nfirst: the " in table
    assert cli.main(["diagnose", "--run_dir=run", "--step=1"]) == 0
    assert "not finite: nothing" in capsys.readouterr().out
