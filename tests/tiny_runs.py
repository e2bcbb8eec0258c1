"""Small files and a small base that several tests train runs on."""

import json

import numpy as np

from flix_jax.data.cells import Mixture
from flix_jax.data.vocabularies import ByteVocabulary
from flix_jax.experiments.run import Evaluation, Run
from flix_jax.models.config import T5Config
from flix_jax.tasks.xtreme_up import XtremeUp
from flix_jax.training.optimizers import Optimizer, Schedule

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
