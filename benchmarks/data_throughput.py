"""Examples per second, of one process, from jsonl files to batches.

    python benchmarks/data_throughput.py [--data_dir DIR] [--rounds 5] [--clock wall]

Reads the training split of every cell of a folder in XTREME-UP's layout, by default of a Babel that
is generated first, and makes one epoch of batches of it:

    read       XtremeUp.pairs: the records as input and target
    convert    load_cells: read, and through seqio's tasks, tokenised, cut, with feature ids
    batch      TrainPipeline.batch_at: padded batches from the examples in memory
    together   convert and batch

The pipeline converts once and makes batches as long as it trains, so that `batch` is the rate in
the long run, and `together` that of a first epoch.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np

from flix_jax.adapters import text_tables
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.data.cells import Mixture, columns
from flix_jax.data.pipeline import TrainPipeline
from flix_jax.data.seqio_tasks import load_cells
from flix_jax.data.vocabularies import ByteVocabulary, SentencePieceVocabulary
from flix_jax.tasks import babel
from flix_jax.tasks.xtreme_up import XtremeUp

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STAGES = ("read", "convert", "batch", "together")


def measure(
    source: XtremeUp,
    vocabulary: ByteVocabulary | SentencePieceVocabulary,
    lengths: dict[str, int],
    batch_size: int,
    clock: Callable[[], float],
) -> tuple[int, int, dict[str, float]]:
    """(cells, examples, seconds by stage) of one epoch over all training data."""
    cells = [cell for cell in source.cells() if "train" in source.splits(cell)]
    space = FeatureSpace((FeatureType("task"), FeatureType("language"))).complete(columns(cells))
    tasks = source.register(cells, vocabulary=vocabulary, space=space)
    seconds = {}
    start = clock()
    examples = sum(len(source.pairs(cell, "train")[0]) for cell in cells)
    seconds["read"] = clock() - start
    start = clock()
    data = load_cells(tasks, lengths)
    seconds["convert"] = clock() - start
    rates = Mixture().rates_for({cell: len(held) for cell, held in data.items()})
    start = clock()
    pipeline = TrainPipeline(data, rates, lengths=lengths, global_batch_size=batch_size)
    for step in range(-(-examples // batch_size)):
        pipeline.batch_at(step)
    seconds["batch"] = clock() - start
    seconds["together"] = seconds["convert"] + seconds["batch"]
    return len(cells), examples, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", help="folder in XTREME-UP's layout (default: a Babel)")
    parser.add_argument("--vocabulary", help="a SentencePiece model (default: bytes)")
    parser.add_argument("--inputs_length", type=int, default=512)
    parser.add_argument("--targets_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a machine that is shared"
    )
    args = parser.parse_args()
    lengths = {"inputs": args.inputs_length, "targets": args.targets_length}
    vocabulary = SentencePieceVocabulary(args.vocabulary) if args.vocabulary else ByteVocabulary()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir:
            source = XtremeUp(args.data_dir)
        else:
            written = babel.write(f"{folder}/babel", seed=0)
            source = XtremeUp(str(written), name="babel", formats=babel.FORMATS)
        rounds = [
            measure(source, vocabulary, lengths, args.batch_size, CLOCKS[args.clock])
            for _ in range(args.rounds + 1)
        ]
    cells, examples, _ = rounds[0]
    print(
        f"{args.data_dir or 'Babel'}: {examples:,} training examples in {cells} cells, "
        f"{lengths['inputs']} / {lengths['targets']} tokens, batches of {args.batch_size}, "
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {args.clock} time, "
        f"{args.rounds} rounds\n"
    )
    rows = [["stage", "examples/s", "quartiles", "slowest"]]
    for stage in STAGES:
        rates = [examples / seconds[stage] for _, _, seconds in rounds[1:]]
        low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75))
        rows.append([stage, f"{middle:,.0f}", f"{low:,.0f} – {high:,.0f}", f"{min(rates):,.0f}"])
    print(text_tables.plain(rows))


if __name__ == "__main__":
    main()
