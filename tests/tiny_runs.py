"""Small files and a small base that several tests train runs on."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flix_jax.data.cells import Mixture
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.experiments import together
from flix_jax.experiments.run import Evaluation, Run
from flix_jax.models.config import T5Config
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.training.axis_rules import AxisRules
from flix_jax.training.optimizers import Optimizer, Schedule
from flix_jax.training.partitioning import MeshSpec
from flix_jax.training.reporting import read_metrics

MODEL = T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.1,
    scan_layers=True,
)

# Eight devices, over which features, widths and examples are split.
SPLIT_MESH = MeshSpec(
    data=2,
    fsdp=2,
    model=2,
    rules=AxisRules(
        parameters=(("embed", None),),
        adapters=(("features", "fsdp"), ("embed", ("fsdp", "data")), ("mlp", "model")),
    ),
)


def write_words(root):
    """Two tasks in three languages: `up/x` is held out, the language `z` entirely."""
    rng = np.random.default_rng(0)
    for task, change in (("up", str.upper), ("back", lambda word: word[::-1])):
        for language, letters in (("x", "abc"), ("y", "def"), ("z", "ghi")):
            for split, count in (("train", 30), ("validation", 5)):
                words = ["".join(rng.choice(list(letters), 4)) for _ in range(count)]
                path = root / task / split / f"{language}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps({"input": word, "target": change(word)}) for word in words]
                path.write_text("\n".join(lines) + "\n")
    return root


def arrays(run_dir, step):
    """All that a checkpoint holds, read by orbax alone."""
    items = {
        name: ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / str(step) / name)
        for name in ("trained", "optimizer")
    }
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
    }


def logged(run_dir):
    """(step, loss, tokens) of every line of a run's log that has a loss."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(x["step"], x["loss"], x["tokens"]) for x in lines if "loss" in x]


def check_same_bits(run_dir, expected_dir, step):
    """All that a checkpoint holds, and every line of the log."""
    found = arrays(run_dir, step)
    for name, value in arrays(expected_dir, step).items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)
    assert logged(run_dir) == logged(expected_dir)


def check_trials_are_solo_runs(run, alone, folder):
    """Trains a run and another of its data together; the first is that which ran alone."""
    runs = [dataclasses.replace(run, seed=s, data_seed=run.order_seed) for s in (run.seed, 1)]
    folders = [folder / "a", folder / "b"]
    together.train_together(
        runs,
        folders,
        bases_dir=folder / "bases",
        configs=[None, None],
        splits=[],
        log_dir=folder / "program",
        title="program",
    )
    expected, first, second = map(logged, (alone, *folders))
    for (step, loss, tokens), (_, wanted, _) in zip(first, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5) and tokens > 0, step
    assert second != first


def check_same_training(run_dir, expected_dir, step):
    """Adapters equal to 2e-5 of their size, of which some have moved, and losses to 1e-5."""
    found, expected = arrays(run_dir, step), arrays(expected_dir, step)
    moved = 0.0
    for name in (name for name in expected if "flix" in name):
        size = np.abs(expected[name]).max()
        assert np.abs(found[name] - expected[name]).max() <= 2e-5 * max(size, 1e-3), name
        moved = max(moved, size if name.endswith("['b']") else 0.0)
    assert moved > 1e-3
    for (at, loss, _), (_, wanted, _) in zip(logged(run_dir), logged(expected_dir), strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5), at


def make_base_run(data_dir):
    """Full training: what the adapters stand on."""
    return Run(
        model=MODEL,
        source=XtremeUp(str(data_dir)),
        vocabulary=ByteVocabulary(),
        mixture=Mixture(held_out=("up/x", "*/z")),
        inputs_length=8,
        targets_length=6,
        total_steps=4,
        batch_size=8,
        optimizer=Optimizer("adafactor", Schedule(learning_rate=1e-2)),
        save_every=20,
        log_every=10,
        evaluation=Evaluation(batch_size=8),
    )


# The same kind of run as gin files, which read data from `data`.
CONFIG = """
include 'configs/runs/adapt.gin'
include 'configs/adapters/flix.gin'
DATA_DIR = %gin.REQUIRED  # folder
T5Config.vocab_size = 384
T5Config.emb_dim = 16
T5Config.num_heads = 2
T5Config.head_dim = 8
T5Config.mlp_dim = 32
T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
Run.source = @XtremeUp()
XtremeUp.data_dir = %DATA_DIR
Run.vocabulary = @ByteVocabulary()
Mixture.held_out = ('up/y',)
Evaluation.batch_size = 8
Run.inputs_length = 8
Run.targets_length = 6
Run.batch_size = 8
Run.total_steps = 4
Run.base = @base/Run()
base/Run.base = 'random'
base/Run.adapters = None
base/Run.total_steps = 2
"""


def write_gin(folder, **others):
    """Writes run.gin, other files of that name with their text, and a folder `data`."""
    for task in ("up", "same"):
        for language in ("x", "y"):
            for split in ("train", "validation"):
                path = folder / "data" / task / split / f"{language}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                words = ["ab", "ba", "cab", "cc"]
                lines = [{"input": w, "target": w.upper() if task == "up" else w} for w in words]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in {"run": CONFIG, **others}.items():
        (folder / f"{name}.gin").write_text(text)
    return folder
