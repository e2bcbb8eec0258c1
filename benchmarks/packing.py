"""Packed batches, and such of nearly one length, against padded ones: useful tokens per second.

    python benchmarks/packing.py --data_dir DIR [--tasks ner topic translation qa_cross_lang]

Reads the training data of tasks in XTREME-UP's layout, tokenised by a SentencePiece model or, where
none is given, by a unigram model of 8,192 pieces that is trained on 20,000 of their texts. One
network at mT5-small's widths with FLix (task and language, rank 4) makes the loss and the adapters'
gradients of batches of as many rows without packing, packed by equal features, and mixed, where
each example of a row has its own; they are interleaved, each round with the next batch. Beside them
is length bucketing, whose round is a batch of every length, each counted by its share in a window
of batches. Useful tokens are those of inputs and of targets that are no padding.
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import figures
import interleaved
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from flix_jax.adapters import text_tables
from flix_jax.adapters.features import FeatureSpace, FeatureType
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.adapters.tree import join, split_adapters
from flix_jax.data.cells import Cell, Mixture, columns
from flix_jax.data.examples import CellData
from flix_jax.data.length_buckets import BATCHES
from flix_jax.data.pipeline import TrainPipeline
from flix_jax.data.seqio_tasks import load_cells
from flix_jax.data.vocabularies import SentencePieceVocabulary
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.models.t5 import Transformer
from flix_jax.tasks.xtreme_up import XtremeUp

TRAIN = "train"
BY_LENGTH = "by length"
PIECES, TEXTS = 8192, 20_000


def trained_vocabulary(source: XtremeUp, cells: list[Cell], prefix: str) -> str:
    """Trains a model on the texts of cells, taken in turn; its file."""
    texts = (
        itertools.chain.from_iterable(zip(*source.pairs(c, TRAIN), strict=True)) for c in cells
    )
    in_turn = (text for row in itertools.zip_longest(*texts) for text in row if text)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.islice(in_turn, TEXTS),
        model_prefix=prefix,
        vocab_size=PIECES,
        character_coverage=0.9995,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return f"{prefix}.model"


class Side(interleaved.Timed):
    """The compiled step, over the batches of a pipeline one after another."""

    def __init__(
        self,
        name: str,
        pipeline: TrainPipeline,
        model: EncoderDecoder,
        trained: Any,
        frozen: Any,
        *steps: int,
    ):
        self.name = name
        self.trained, self.frozen = trained, frozen
        made = [pipeline.batch_at(step) for step in steps]
        self.useful = [
            sum(
                int((b[f"{part}_tokens"] > 0).sum()) for part in ("encoder_input", "decoder_target")
            )
            for b in made
        ]
        self.batches = jax.block_until_ready(jax.tree.map(jnp.asarray, made))
        self.times = []
        self.gradients = jax.tree.map(jnp.zeros_like, trained)

        def step(trained, frozen, batch, last_gradients):
            del last_gradients  # donated: its buffers take the new gradients
            (loss, _), gradients = jax.value_and_grad(
                lambda t: model.loss(join(frozen, t), batch), has_aux=True
            )(trained)
            return loss, gradients

        self.compile(step, donated=3)

    def arguments(self) -> tuple[Any, ...]:
        batch = self.batches[len(self.times) % len(self.batches)]
        return self.trained, self.frozen, batch, self.gradients


class ByLength(interleaved.Timed):
    """Sides of a batch of every length that a window has: their times, by its share."""

    def __init__(self, name: str, pipeline: TrainPipeline, *of: Any):
        self.name = name
        told = pipeline.report().by_length
        assert told is not None
        self.shares = {shape: told.lengths.count(shape) / BATCHES for shape in told.lengths}
        self.sides = [
            Side(f"{name}, {'/'.join(map(str, shape))}", pipeline, *of, told.lengths.index(shape))
            for shape in self.shares
        ]
        self.useful_of_window = sum(told.tokens) / BATCHES
        self.times = []

    def run(self, clock: Callable[[], float]) -> None:
        for side in self.sides:
            side.run(clock)
        shares = zip(self.shares.values(), self.sides, strict=True)
        self.times.append(sum(share * side.times[-1] for share, side in shares))


def read(source: XtremeUp, cells: list[Cell], vocabulary: Any, lengths: dict[str, int]):
    """(data of the cells, feature space)."""
    space = FeatureSpace((FeatureType("task"), FeatureType("language"))).complete(columns(cells))
    tasks = source.register(cells, vocabulary=vocabulary, space=space)
    data: dict[Cell, CellData] = load_cells(tasks, lengths)
    return data, space


def main() -> None:
    parser = interleaved.parser(__doc__)
    parser.add_argument("--data_dir", required=True, help="folder in XTREME-UP's layout")
    tasks = ["ner", "topic", "translation", "qa_cross_lang"]
    parser.add_argument("--tasks", nargs="+", default=tasks)
    parser.add_argument("--model", help="a SentencePiece model (default: one of the data)")
    parser.add_argument("--most", type=int, default=8, help="examples in a mixed row (default 8)")
    parser.add_argument(
        "--buckets", type=int, nargs=2, default=(3, 3), help="lengths of inputs, targets (3 3)"
    )
    parser.set_defaults(batch=8, input_length=512, target_length=128)
    args = parser.parse_args()
    lengths = {"inputs": args.input_length, "targets": args.target_length}
    source = XtremeUp(args.data_dir)
    cells = [c for c in source.cells() if c.task in args.tasks and TRAIN in source.splits(c)]
    with tempfile.TemporaryDirectory() as folder:
        model_file = args.model or trained_vocabulary(source, cells, f"{folder}/pieces")
        vocabulary = SentencePieceVocabulary(model_file)
        data, space = read(source, cells, vocabulary, lengths)
        vocab_size = -(-vocabulary.vocab_size // 128) * 128
    config = T5Config(
        vocab_size=vocab_size,
        num_encoder_layers=args.layers,
        num_decoder_layers=args.layers,
        dropout_rate=0.0,
    )
    model = EncoderDecoder(Transformer(config), AdapterSpec(space))
    rates = Mixture().rates_for({cell: len(of) for cell, of in data.items()})
    manners: dict[str, dict[str, Any]] = {
        "padded": {},
        "packed": {"packing": True},
        "mixed": {"packing": True, "examples_per_row": args.most},
        BY_LENGTH: {"length_buckets": dict(zip(lengths, args.buckets, strict=True))},
    }
    pipelines = {
        name: TrainPipeline(data, rates, lengths=lengths, global_batch_size=args.batch, **manner)
        for name, manner in manners.items()
    }
    shapes = pipelines["padded"].shapes()
    params = jax.jit(lambda key: model.init(key, shapes))(jax.random.key(0))
    frozen, trained = split_adapters(params)
    of = (model, trained, frozen)
    sides = {
        name: Side(name, pipelines[name], *of, *range(args.rounds + 2))
        for name in ("padded", "packed", "mixed")
    }
    by_length = ByLength(BY_LENGTH, pipelines[BY_LENGTH], *of)
    timed = [*sides.values(), by_length]
    interleaved.run(timed, args.rounds, interleaved.CLOCKS[args.clock])
    report = pipelines["packed"].report()
    print(
        f"\n{sum(map(len, data.values())):,} examples of {len(cells)} cells of "
        f"{', '.join(args.tasks)}; {args.layers}+{args.layers} layers, {args.batch} rows of "
        f"{args.input_length}/{args.target_length}, vocabulary {vocab_size:,}, "
        f"{args.clock} time, {args.rounds} rounds"
    )
    for name in ("packed", "mixed"):
        told = pipelines[name].report().packing
        assert told is not None
        print(f"{name}: {told.line().removeprefix('packed: ')}")
    buckets = pipelines[BY_LENGTH].report().by_length
    assert buckets is not None
    print(buckets.line())
    cut = [
        sum(getattr(row, n) or 0 for row in report.cells.values())
        for n in ("cut_inputs", "cut_targets")
    ]
    print(f"cut on both sides alike: {cut[0]:,} inputs, {cut[1]:,} targets\n")
    rows = [["batches", "seconds", "useful tokens a step", "useful tokens/s"]]
    speed = {}
    for name, side in sides.items():
        useful = np.asarray(side.useful[2:], float)
        speed[name] = useful / np.asarray(side.times)
        seconds, tokens, rate = np.median(side.times), np.median(useful), np.median(speed[name])
        rows.append([name, f"{seconds:.3f}", f"{tokens:,.0f}", f"{rate:,.0f}"])
    seconds, tokens = np.median(by_length.times), by_length.useful_of_window
    rows.append([BY_LENGTH, f"{seconds:.3f}", f"{tokens:,.0f}", f"{tokens / seconds:,.0f}"])
    print(text_tables.plain(rows))
    for one, other in (("packed", "padded"), ("mixed", "packed")):
        ratios = speed[one] / speed[other]
        figures.tell_ratios(f"{one} / {other}", ratios)
        print(f"\nuseful tokens/s, {one} / {other}: {interleaved.quartiles(ratios)}")
        print(f"seconds a step, {one} / {other}: {interleaved.ratio(sides[one], sides[other])}")
    # A window has the same examples with and without.
    ratios = interleaved.ratios(sides["padded"], by_length)
    figures.tell_ratios(f"{BY_LENGTH} / padded", ratios)
    print(f"\nuseful tokens/s, {BY_LENGTH} / padded: {interleaved.quartiles(ratios)}")


if __name__ == "__main__":
    main()
