"""What a run writes down: windows, restarts and torn files."""

import importlib.util
import json
import sys
import types

import jax.numpy as jnp
import pytest

from flix_jax import processes
from flix_jax.training.not_finite import NotFinite
from flix_jax.training.reporting import Reporter, read_metrics
from flix_jax.training.wandb_sink import check_installed


def make_reporter(run_dir, *, start=0, log_every=1, **options):
    return Reporter(
        run_dir,
        total_steps=10,
        start_step=start,
        log_every=log_every,
        wait_seconds=lambda: 0.0,
        **options,
    )


def report(run_dir, steps, *, start=0, log_every=2, scores_at=()):
    reporter = make_reporter(run_dir, start=start, log_every=log_every)
    for step in steps:
        reporter.step(
            step,
            {"loss": jnp.float32(step), "accuracy": jnp.float32(0.5), "tokens": jnp.float32(8)},
        )
        if step in scores_at:
            reporter.scores(step, {"ner/sw": {"span_f1": 12.5}})
    reporter.close()
    return read_metrics(run_dir / "metrics.jsonl")


def test_lines_are_means_over_windows(tmp_path):
    lines = report(tmp_path, range(1, 6), scores_at=(4,))
    assert [(x["step"], x.get("loss")) for x in lines] == [(2, 1.5), (4, 3.5), (4, None), (5, 5.0)]
    assert lines[2] == {"step": 4, "ner/sw/span_f1": 12.5}
    assert [x["tokens"] for x in lines if "tokens" in x] == [16, 32, 40]
    assert all(0 <= x["data_wait"] <= 1 for x in lines if "loss" in x)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_restart_writes_no_step_twice_and_loses_none(tmp_path):
    report(tmp_path, range(1, 8))
    lines = report(tmp_path, range(5, 9), start=4)
    assert [x["step"] for x in lines] == [2, 4, 6, 8]


def test_lines_that_were_lost_are_told(tmp_path, capsys):
    reporter = make_reporter(tmp_path)
    for step in range(1, 5):
        reporter.step(step, {name: jnp.float32(1) for name in ("loss", "accuracy", "tokens")})
    reporter.flush()
    state = reporter.state()
    reporter.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]))
    capsys.readouterr()
    make_reporter(tmp_path, start=4, resumed=state).close()
    lost = len(lines) - 1
    assert f"metrics.jsonl has lost {lost} of the {len(lines)} lines" in capsys.readouterr().err
    assert read_metrics(path) == [json.loads(lines[0])]


@pytest.mark.parametrize("text", ["[]", "3", '{"loss": 1.0}'])
def test_a_line_that_is_no_line_of_metrics_is_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"step": 1}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: .*: expected an object with a step"):
        read_metrics(tmp_path / "metrics.jsonl")


NAN = float("nan")


def skipping(run_dir, losses, *, first=1, resumed=None, skips_in_a_row=2):
    """Reports steps of which those that are not finite were skipped; lines, and what is saved."""
    reporter = make_reporter(
        run_dir, start=first - 1, log_every=4, resumed=resumed, skips_in_a_row=skips_in_a_row
    )
    try:
        for step, loss in enumerate(losses, first):
            skipped = float(loss != loss)
            metrics = {"loss": loss, "accuracy": 0.5, "tokens": 8.0, "skipped": skipped}
            reporter.step(step, {name: jnp.float32(value) for name, value in metrics.items()})
        state = json.loads(json.dumps(reporter.state(), allow_nan=False))
    finally:
        reporter.close(partial=False)
    return read_metrics(run_dir / "metrics.jsonl"), state


def test_skipped_steps_are_counted_through_restarts_and_are_in_no_mean(tmp_path):
    lines, state = skipping(tmp_path, [1.0, NAN, 3.0, 2.0, NAN, NAN])
    assert [(x["step"], x["loss"], x["skipped"], x["tokens"]) for x in lines] == [(4, 2.0, 1, 32)]
    lines, state = skipping(tmp_path, [5.0, 7.0, NAN], first=7, resumed=state)
    assert [(x["step"], x["loss"], x["skipped"], x["tokens"]) for x in lines[1:]] == [(8, 6, 3, 64)]
    # A window in which every step was skipped has no means; in a row, over windows and restarts:
    with pytest.raises(NotFinite, match="3 steps in a row are not finite: the last is step 11"):
        skipping(tmp_path, [NAN, NAN, 1.0], first=10, resumed=state)
    lines, _ = skipping(tmp_path, [NAN] * 3, first=10, resumed=state, skips_in_a_row=4)
    assert (lines[-1]["step"], lines[-1]["skipped"], "loss" in lines[-1]) == (12, 7, False)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_found_in_a_window_that_was_saved(tmp_path, name):
    window = [[1, {"loss": 1.0, "grad_norm": 1.0, "tokens": 8.0, name: float("inf")}]]
    reporter = make_reporter(tmp_path, start=1, resumed={"lines": 0, "tokens": 0, "window": window})
    with pytest.raises(NotFinite, match="is inf at step 1") as error:
        reporter.close()
    assert error.value.step == 1 and read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_torn_last_line_is_left_out_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_tensorboard_reads_the_hyperparameters(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    given = {"optimizer.name": "sgd", "seed": 3.0}
    make_reporter(tmp_path, hparams=given).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    read = {k: v.string_value or v.number_value for k, v in start.hparams.items()}
    assert read == given and start.group_name == tmp_path.name


def report_to_wandb(folder):
    reporter = make_reporter(folder, hparams={"seed": 3.0}, wandb_project="tests")
    for step in (1, 2):
        values = {"loss": step, "accuracy": 0.5, "tokens": 8}
        reporter.step(step, {name: jnp.float32(value) for name, value in values.items()})
    reporter.close()


def test_wandb_gets_what_tensorboard_gets_in_one_run_over_restarts(tmp_path, monkeypatch):
    runs = []

    class Recorded:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Recorded))
    report_to_wandb(tmp_path)
    report_to_wandb(tmp_path)
    first, second = runs
    assert [(step, values["train/loss"]) for step, values in first.logged] == [(1, 1.0), (2, 2.0)]
    assert first.options["config"] == {"seed": 3.0} and first.options["name"] == tmp_path.name
    assert first.options["id"] == second.options["id"] and first.finished


def test_of_several_processes_the_first_alone_reports(tmp_path, monkeypatch):
    def refused(**options):
        raise AssertionError("another process has reported")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refused))
    monkeypatch.setattr(processes, "index", lambda: 1)
    report_to_wandb(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wandb_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    report_to_wandb(tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (tmp_path / "wandb_id.txt").read_text().strip() in folder.name
    assert list(folder.glob("*.wandb"))


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Run.wandb_project='x': wandb is not installed"):
        check_installed("x")
    check_installed(None)
