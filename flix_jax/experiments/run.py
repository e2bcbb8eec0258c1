"""What a run is: a model, data, adapters, an optimizer and a base, as one value."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flix_jax.adapters import tables as tables_lib
from flix_jax.adapters import targets as targets_lib
from flix_jax.adapters.injection import AdapterSpec
from flix_jax.adapters.modules import MERGED
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.adapters.tree import check_foldable
from flix_jax.data.cells import CellSplit, Mixture, Source
from flix_jax.data.examples import TOKENS
from flix_jax.data.vocabularies import Vocabulary
from flix_jax.models.config import T5Config
from flix_jax.tasks.source_text import SourceText
from flix_jax.training.optimizers import Optimizer
from flix_jax.training.partitioning import MeshSpec

FROZEN_DTYPES = ("float32", "bfloat16", "float16", "int8")

# What an ensemble takes the mean of, and which trained cells are its members.
ENSEMBLES = ("weights", "logits")
MEMBERS = ("related", "task", "language")

# What is done with a step whose loss or gradient is not finite.
STOP, SKIP = "stop", "skip"

#: ``Run.base`` of a run that starts from random parameters.
RANDOM = "random"
MIXED = "mixed"
EXAMPLES_PER_ROW = 8  # of mixed packing, where nothing is said
BY_CELL = "by_cell"
ROWS_PER_CELL = 8  # of batches by cell, where nothing is said

# What may change between two starts of a run, as name=value: it decides what is seen of the result,
# or where the same data lie, but not what the result is. (A run that `not_finite` has stopped may
# go on by skipping: the steps before are the same.)
FREE = re.compile(
    r"(base\.)*((log_every|save_every|keep|keep_period|wandb_project|evaluation\..*|mesh\..*"
    r"|tables(\..*)?|not_finite|skips_in_a_row|source\.(data|cache)_dir"
    r"|vocabulary\.path)=.*|mixture\.overlap='(report|ignore)')",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a run is evaluated.

    Attributes:
      split: the split, of every cell that has it.
      batch_size: examples decoded at once; the last batch of a cell is padded to it.
      every: steps between evaluations while training, the last step always among them; None
        leaves evaluation to `flix evaluate`.
      examples_per_cell: a budget for evaluations while training; None takes the whole split.
      examples: such a budget for all cells together, instead: they give in turns, so that each
        counts alike until it has no more (`scoring.even_share`).
      keep_best: the number by which the best checkpoint is kept, beside the newest, as it is found
        in evaluations while training: `'mean_seen'`, `'mean_unseen'`, `'mean_unseen_language'` or
        `'mean_under_represented'` over tasks, `'ner/mean_seen'` of one, `'ner/sw'` of a cell, or
        `'ner/sw:exact_match'`. Error rates count as 100 - rate. None keeps the newest alone.
      ensemble: of a run whose every cell has its own adapter (features of one type, 'cell'): how
        cells that are not trained on run on several adapters, by the mean of their 'weights' or of
        their 'logits' (see `experiments.ensembles`); None runs them on the base alone.
      ensemble_of: which trained cells are the members: those of a cell's 'task', of its 'language',
        or 'related', of either.
    """

    split: str = "validation"
    batch_size: int = 64
    every: int | None = None
    examples_per_cell: int | None = None
    examples: int | None = None
    keep_best: str | None = None
    ensemble: str | None = None
    ensemble_of: str = "related"

    def __post_init__(self) -> None:
        for name in ("batch_size", "every", "examples_per_cell", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Evaluation.{name} must be at least 1, got {value}")
        if self.examples is not None and self.examples_per_cell is not None:
            raise ValueError(
                "Evaluation.examples and Evaluation.examples_per_cell exclude each other"
            )
        if self.keep_best is not None and self.every is None:
            raise ValueError(
                f"Evaluation.keep_best={self.keep_best!r} has no effect without Evaluation.every"
            )
        for name, known in (("ensemble", ENSEMBLES), ("ensemble_of", MEMBERS)):
            value = getattr(self, name)
            if value not in known and not (name == "ensemble" and value is None):
                raise ValueError(
                    f"Evaluation.{name}={value!r}: expected one of {', '.join(map(repr, known))}; "
                    + did_you_mean(str(value), known)
                )
        if self.ensemble is None and self.ensemble_of != "related":
            raise ValueError(
                f"Evaluation.ensemble_of={self.ensemble_of!r} has no effect without "
                "Evaluation.ensemble"
            )

    @property
    def best_by(self) -> dict[str, Any] | None:
        """What the values of `keep_best` are of: values compare where it is equal."""
        if self.keep_best is None:
            return None
        names = ("keep_best", "split", "examples_per_cell", "examples")
        best = {name: getattr(self, name) for name in names}
        if self.ensemble is not None:
            best |= {"ensemble": self.ensemble, "ensemble_of": self.ensemble_of}
        return best


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      model: the network.
      source: where the cells come from.
      source_text: which English source each example has, for adapters that fuse with it, or for
        the encoder to read before the input; None for a run without. (`source` is where the
        examples come from.)
      vocabulary: how text becomes tokens.
      mixture: the cells that are trained on and those that are held out.
      inputs_length, targets_length: tokens, the end of the sequence included; longer examples are
        cut, and counted.
      total_steps, batch_size: updates, and rows of the global batch in each: examples, without
        `packing`.
      base: the parameters to start from: ``'random'``, the folder of a run that trained every
        parameter, or such a run, which is then trained first, as is one of a LoRA, which is then
        folded; or a folder of Hugging Face's or a checkpoint of T5X's, local or in a bucket, of the
        network that `model` describes.
      seen_by_base: patterns of held-out cells that the base may be trained on, by denoising their
        texts, say. Without them a base that is trained on a held-out cell is refused.
      adapters: what is trained beside the frozen base; None trains the base itself.
      adapters_from: a folder of adapters (`flix export --format=flix`, `flix features`) from whose
        values those of the same names start; others start freshly, as all do with None. The base,
        the network, the targets, alpha and the vocabulary must be the same.
      train_values: patterns over the adapters' features (``'language=(rw|sw)'``) that are trained,
        each of which must match one that a training cell has; the others keep their bits. None
        trains all.
      trainable: without adapters, patterns over parameter paths (``'.*/scale'``) that are trained;
        None trains everything.
      optimizer: over the trained parameters.
      transforms: by pattern over cells, what is done to an example whenever it is drawn (noise,
        windows); see ``TrainPipeline``.
      packing: whether a row of a batch holds several examples, as many as have room (T5X's `pack`;
        see `data.packing`). With True all of equal features, whose dropout is drawn for the row;
        with 'mixed' of any, each with its own. Not with transforms, nor with sources that are
        fused.
      examples_per_row: of mixed packing, how many examples a row holds at most; with how many an
        adapter's products grow. None is 8.
      batching: 'mixed' draws the cell of every example by itself; 'by_cell' of several consecutive
        rows at once, which then have the same features, and the same of them dropped: an adapter
        computes with them as one. Cells are drawn at the same rates. A batch holds fewer of them,
        so that a gradient varies more from one to the next (see docs/data.md).
      rows_per_cell: of batches by cell, how many consecutive rows are of one, a divisor of
        `batch_size`. None is 8.
      length_buckets: how many lengths the inputs and the targets of a batch may have: with 3 those
        of the run, their halves and quarters. Batches are then of examples of nearly one length,
        and every pair of lengths is compiled once; what that does to a batch is told in
        docs/data.md and by the log. A number for both, or {'inputs': n, 'targets': m}; 1 pads all
        batches alike. Not with packing.
      read_lengths: (inputs, targets) in tokens to which examples are cut when they are read, for
        transforms that shorten them; None is the lengths of the batch.
      microbatches: parts of a batch that are computed one after another, to save memory.
      loss_chunks: parts of the targets whose logits are made one after another, so that those of a
        large vocabulary never stand whole; a divisor of `targets_length`.
      label_smoothing, z_loss: of the loss (T5X's definitions).
      frozen_dtype: the frozen parameters' dtype, one of ``FROZEN_DTYPES``; None leaves them. 'int8'
        keeps matrices so, with a float32 scale per output channel, and the rest as it is.
      tables: what a training step makes of the adapters' banks before the network uses them
        (`adapters.tables`): 'rows', 'all', 'merged' for kernels that hold the update of a row, or
        of rows of a cell (`adapters.merged`), 'banks' for nothing, or, for each layer what is
        thought fastest, 'fastest', and 'auto', which takes 'merged' only of kernels that are kept
        in float32. The result is the same but for rounding, of which 'merged' has more where
        kernels are kept in bfloat16. Or {target: one of these}, for the adapted layers that it
        matches (targets as `AdapterSpec.targets`; the first that matches a layer holds, and layers
        that none matches are 'auto').
      mesh: how the devices are arranged.
      seed: of initialisation, dropout and the order of the data.
      data_seed: of the order of the data, where it is another one: runs of several seeds that see
        the same batches. None is ``seed``.
      save_every, log_every: in steps.
      keep: how many of the newest checkpoints are kept.
      keep_period: checkpoints of steps that it divides are kept too. None keeps no others.
      evaluation: how the run is evaluated.
      not_finite: what is done with a step whose loss or gradient is not finite: 'stop' ends the
        run, with a dump of the step (`flix diagnose`); 'skip' leaves parameters and optimizer as
        they were, goes on with the next batch, and counts.
      skips_in_a_row: how many steps in a row may be skipped; one more ends the run. No effect with
        'stop'.
      wandb_project: of Weights & Biases, which then gets what TensorBoard gets;
        `WANDB_MODE=offline` keeps it in the run's folder. None does without.
    """

    model: T5Config
    source: Source
    vocabulary: Vocabulary
    mixture: Mixture
    inputs_length: int
    targets_length: int
    total_steps: int
    batch_size: int
    base: str | Run = RANDOM
    seen_by_base: tuple[str, ...] = ()
    adapters: AdapterSpec | None = None
    adapters_from: str | None = None
    train_values: tuple[str, ...] | None = None
    source_text: SourceText | None = None
    trainable: tuple[str, ...] | None = None
    optimizer: Optimizer = Optimizer()
    transforms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    packing: bool | str = False
    examples_per_row: int | None = None
    batching: str = MIXED
    rows_per_cell: int | None = None
    length_buckets: int | Mapping[str, int] = 1
    read_lengths: tuple[int, int] | None = None
    microbatches: int = 1
    loss_chunks: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    frozen_dtype: str | None = None
    tables: str | Mapping[str, str] = tables_lib.AUTO
    mesh: MeshSpec = MeshSpec()
    seed: int = 0
    data_seed: int | None = None
    save_every: int = 1000
    log_every: int = 50
    keep: int = 2
    keep_period: int | None = None
    evaluation: Evaluation = Evaluation()
    not_finite: str = STOP
    skips_in_a_row: int = 20
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        sizes = "inputs_length targets_length total_steps batch_size microbatches save_every"
        for name in [*sizes.split(), "log_every", "keep", "skips_in_a_row"]:
            if getattr(self, name) < 1:
                raise ValueError(f"Run.{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"Run.label_smoothing = {self.label_smoothing!r}: expected [0, 1)")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"Run.z_loss = {self.z_loss!r}: expected at least 0")
        for cell, transform in self.transforms.items():
            if not callable(transform):
                raise ValueError(
                    f"Run.transforms[{cell!r}] = {transform!r}: expected what changes an example, "
                    "such as @SpanCorruption()"
                )
        if self.keep_period is not None and (
            self.keep_period < 1 or self.keep_period % self.save_every
        ):
            raise ValueError(
                f"Run.keep_period = {self.keep_period}: expected a multiple of Run.save_every = "
                f"{self.save_every}"
            )
        if self.loss_chunks < 1 or self.targets_length % self.loss_chunks:
            raise ValueError(
                f"Run.loss_chunks = {self.loss_chunks}: expected a divisor of Run.targets_length "
                f"= {self.targets_length}"
            )
        if self.read_lengths is not None and not self.transforms:
            raise ValueError("Run.read_lengths has no effect without Run.transforms")
        self._check_packing()
        self._check_batching()
        self._check_length_buckets()
        if self.frozen_dtype is not None and self.frozen_dtype not in FROZEN_DTYPES:
            raise ValueError(
                f"Run.frozen_dtype {self.frozen_dtype!r} is none of {list(FROZEN_DTYPES)}; "
                + did_you_mean(self.frozen_dtype, FROZEN_DTYPES)
            )
        if self.frozen_dtype is not None and self.trains_everything:
            raise ValueError("Run.frozen_dtype has no effect: every parameter is trained")
        if self.adapters is not None and self.trainable is not None:
            raise ValueError("Run.trainable and Run.adapters exclude each other")
        for name in ("adapters_from", "train_values"):
            if self.adapters is None and getattr(self, name) is not None:
                raise ValueError(
                    f"Run.{name} has no effect without Run.adapters (in gin, a base that is a run "
                    f"needs base/Run.{name} = None)"
                )
        if self.train_values is not None:
            texts = [isinstance(pattern, str) for pattern in self.train_values]
            if isinstance(self.train_values, str) or not texts or not all(texts):
                raise ValueError(
                    f"Run.train_values = {self.train_values!r}: expected patterns, such as "
                    "('language=sw',), or None for all"
                )
        if self.not_finite not in (STOP, SKIP):
            near = did_you_mean(str(self.not_finite), (STOP, SKIP))
            raise ValueError(
                f"Run.not_finite = {self.not_finite!r}: expected {STOP!r} or {SKIP!r}; {near}"
            )
        if self.optimizer.lazy and self.adapters is None:
            raise ValueError(
                "Optimizer.lazy = True has no effect without Run.adapters (in gin, a base that is "
                "a run may need base/Optimizer.lazy = False)"
            )
        self._check_tables()
        self._check_source_text()
        if isinstance(self.base, Run):
            for name in ("model", "vocabulary"):
                if getattr(self.base, name) != getattr(self, name):
                    raise ValueError(f"Run.base has another {name} than the run itself")
            self.base.check_is_base()
        self.optimizer.schedule.build(self.total_steps)

    def _check_packing(self) -> None:
        if self.packing not in (True, False, MIXED):
            near = did_you_mean(str(self.packing), (MIXED,))
            raise ValueError(
                f"Run.packing = {self.packing!r}: expected True, False or {MIXED!r}; {near}"
            )
        if self.examples_per_row is not None and self.packing != MIXED:
            raise ValueError(
                f"Run.examples_per_row = {self.examples_per_row} has no effect without "
                f"Run.packing = {MIXED!r}"
            )
        if self.examples_per_row is not None and self.examples_per_row < 1:
            raise ValueError(
                f"Run.examples_per_row must be at least 1, got {self.examples_per_row}"
            )
        if self.packing and self.transforms:
            raise ValueError(
                f"Run.packing = {self.packing!r}: Run.transforms change the lengths of examples "
                "when they are drawn, which packing must know before; expected one or the other "
                "(in gin, a base that is a run may need base/Run.packing = False)"
            )
        if self.packing and self.sources_length is not None:
            raise ValueError(
                f"Run.packing = {self.packing!r}: examples with sources that adapters fuse with "
                "are not packed; expected Run.packing = False, or SourceText.joined"
            )

    def _check_batching(self) -> None:
        if self.batching not in (MIXED, BY_CELL):
            near = did_you_mean(str(self.batching), (MIXED, BY_CELL))
            raise ValueError(
                f"Run.batching = {self.batching!r}: expected {MIXED!r} or {BY_CELL!r}; {near}"
            )
        if self.rows_per_cell is not None and self.batching != BY_CELL:
            raise ValueError(
                f"Run.rows_per_cell = {self.rows_per_cell} has no effect without Run.batching = "
                f"{BY_CELL!r}"
            )
        if self.rows_per_cell is not None and self.rows_per_cell < 1:
            raise ValueError(f"Run.rows_per_cell must be at least 1, got {self.rows_per_cell}")
        if self.batch_size % self.rows_of_a_cell:
            raise ValueError(
                f"Run.batch_size = {self.batch_size}: expected a multiple of Run.rows_per_cell = "
                f"{self.rows_of_a_cell}"
            )
        if self.batching == BY_CELL and self.packing:
            raise ValueError(
                f"Run.batching = {BY_CELL!r}: packed rows have the cells that fill them; expected "
                "Run.packing = False"
            )

    def _check_length_buckets(self) -> None:
        given = self.length_buckets
        place = f"Run.length_buckets = {given!r}"
        if isinstance(given, Mapping):
            for side in given:
                if side not in TOKENS:
                    near = did_you_mean(str(side), TOKENS)
                    raise ValueError(f"{place}: {side!r} is none of {list(TOKENS)}; {near}")
        counts = given.values() if isinstance(given, Mapping) else [given]
        if not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError(
                f"{place}: expected how many lengths there are, 1 or more, or such numbers for "
                "'inputs' and 'targets'"
            )
        per_side = self.lengths_per_side
        # Equal values are one, whatever way they were given in.
        object.__setattr__(self, "length_buckets", per_side or 1)
        if per_side and self.packing:
            raise ValueError(
                f"{place}: Run.packing = {self.packing!r} fills rows of one length; expected one "
                "or the other (in gin, a base that is a run may need base/Run.length_buckets = 1)"
            )
        for side, parts in zip(TOKENS, (1, self.loss_chunks), strict=True):
            length, count = getattr(self, f"{side}_length"), per_side.get(side, 1)
            if count > length.bit_length():
                raise ValueError(
                    f"{place}: how many lengths, of which each is half of the next; those of "
                    f"Run.{side}_length = {length} are at most {length.bit_length()}"
                )
            if length % (parts * 2 ** (count - 1)):
                of = "" if parts == 1 else f" and Run.loss_chunks = {parts}"
                raise ValueError(
                    f"{place}: Run.{side}_length = {length} is halved for each but the first; "
                    f"expected, with this{of}, a multiple of {parts * 2 ** (count - 1)} (in gin, a "
                    "base that is a run may need base/Run.length_buckets = 1)"
                )

    @property
    def merge_problem(self) -> str | None:
        """Why kernels cannot hold an adapter's update and give the same; None where they can."""
        if self.adapters is None or self.adapters.fusion is not None:
            return "there are no adapters" if self.adapters is None else "layers are fused"
        if self.adapters.dropout:
            return f"AdapterSpec.dropout = {self.adapters.dropout} is of the adapters' input alone"
        if self.own_features is not None:
            return f"Run.packing = {MIXED!r}: examples of a row have features of their own"
        if self.frozen_dtype == "int8":
            return "Run.frozen_dtype = 'int8': such kernels take no update"
        return None

    @property
    def tables_by_target(self) -> tuple[Mapping[str, str], str]:
        """`tables` as (by target, of other layers)."""
        if isinstance(self.tables, Mapping):
            return self.tables, tables_lib.AUTO
        return {}, self.tables

    @property
    def merges_exactly(self) -> bool:
        """Whether kernels can hold an update and the output is no further from the exact one.

        In kernels that are kept in float32; narrower ones lose what is small beside them.
        """
        return self.merge_problem is None and self.frozen_dtype in (None, "float32")

    def _check_tables(self) -> None:
        by_target, others = self.tables_by_target
        for target, kind in by_target.items():
            targets_lib.compiled(target, "Run.tables")
            self._check_table(f"Run.tables[{target!r}] = {kind!r}", kind)
        self._check_table(f"Run.tables = {others!r}", others)

    def _check_table(self, place: str, kind: str) -> None:
        known = (tables_lib.AUTO, tables_lib.FASTEST, tables_lib.NONE, *tables_lib.KINDS)
        if kind not in known:
            raise ValueError(f"{place}: expected one of {known}; {did_you_mean(str(kind), known)}")
        if kind in tables_lib.KINDS and (self.adapters is None or self.adapters.fusion is not None):
            reason = "without Run.adapters" if self.adapters is None else "where layers are fused"
            raise ValueError(f"{place} has no effect {reason}")
        if tables_lib.KINDS.get(kind) == MERGED and self.merge_problem is not None:
            raise ValueError(f"{place}: {self.merge_problem}")

    def check_is_base(self) -> None:
        """ValueError where what this run trains is no network that another run can stand on."""
        if self.trains_everything:
            return
        if self.adapters is None:
            raise ValueError("Run.base must train every parameter, or adapters that can be folded")
        try:
            check_foldable(self.adapters)
        except ValueError as error:
            raise ValueError(f"Run.base: {error} (base/AdapterSpec.fusion = None)") from None
        if self.frozen_dtype not in (None, "float32"):
            raise ValueError(
                f"Run.base has Run.frozen_dtype = {self.frozen_dtype!r}: its adapters cannot be "
                "folded without rounding; expected None"
            )

    def _check_source_text(self) -> None:
        fusion = None if self.adapters is None else self.adapters.fusion
        if fusion is not None and self.sources_length is None:
            raise ValueError(
                f"AdapterSpec.fusion = {fusion.function!r} reads a source, which the run has not: "
                "expected Run.source_text = @SourceText(), without SourceText.joined"
            )
        if fusion is not None and fusion.source_width is not None:
            raise ValueError(
                f"Fusion.source_width = {fusion.source_width}: a run reads sources as text, with "
                "its own network; expected None"
            )
        if self.source_text is None:
            return
        if not hasattr(self.source, "check_sources"):
            raise ValueError(
                f"Run.source_text: Run.source={type(self.source).__name__} has no English sources: "
                "expected methods sources(cell, split, source_text) and check_sources, as XtremeUp "
                "has"
            )
        if fusion is None and self.sources_length is not None:
            raise ValueError(
                "Run.source_text has no effect without AdapterSpec.fusion = @Fusion() (in gin, a "
                "base that is a run needs base/Run.source_text = None); SourceText.joined = "
                "'{source} {input}' puts sources into the encoder's input instead"
            )

    @property
    def sources_length(self) -> int | None:
        """Of the sources that adapters fuse with, in tokens; None where there are none."""
        if self.source_text is None or self.source_text.joined is not None:
            return None
        return self.source_text.length or self.inputs_length

    @property
    def own_features(self) -> int | None:
        """How many examples of a row have features of their own; None where a row has some."""
        return (self.examples_per_row or EXAMPLES_PER_ROW) if self.packing == MIXED else None

    @property
    def rows_of_a_cell(self) -> int:
        """How many consecutive rows of a batch are of one cell, and have its features."""
        return (self.rows_per_cell or ROWS_PER_CELL) if self.batching == BY_CELL else 1

    @property
    def lengths_per_side(self) -> dict[str, int]:
        """How many lengths inputs and targets of a batch may have; {} where all have one."""
        of = self.length_buckets
        both = of if isinstance(of, Mapping) else dict.fromkeys(TOKENS, of)
        if max(both.values(), default=1) == 1:
            return {}
        return {side: both.get(side, 1) for side in TOKENS}

    @property
    def most_examples(self) -> int:
        """How many examples whose features are their own a batch may have."""
        return self.batch_size * (self.own_features or 1)

    def split(self) -> CellSplit:
        """The cells that are trained on and those that are held out.

        Raises:
          ValueError: a pattern matches no cell, or none is left to train on.
        """
        source = self.source
        return self.mixture.select(source.cells(), lambda cell: "train" in source.splits(cell))

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def trains_everything(self) -> bool:
        """Whether the checkpoints of this run are whole models."""
        return self.adapters is None and self.trainable is None

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint of this step is made in any case."""
        return step == self.total_steps or step % self.save_every == 0

    def describe(self) -> dict[str, str]:
        """Every value of the run by its dotted name, as text."""
        values = {value.name: value.text for value in _flatten(self, "")}
        if not self.optimizer.schedule.depends_on_total_steps:
            del values["total_steps"]
        return values

    def hparams(self) -> dict[str, str | float]:
        """The values of the description that are not at their default, of their own types."""
        plain = self.defaults()
        found: dict[str, str | float] = {}
        for name, text in self.describe().items():
            if name in plain or name.startswith("base."):
                continue
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):  # a name, such as that of a class
                value = text
            found[name] = value if isinstance(value, str | bool | int | float) else text
        return found

    def fingerprint(self) -> str:
        """A short digest of the description: equal for runs with equal results.

        Values at their default do not count, so that an option that is added later does not tell
        apart runs that do not use it.
        """
        plain = self.defaults()
        values = {
            k: v
            for k, v in self.describe().items()
            if not FREE.fullmatch(f"{k}={v}") and k not in plain
        }
        values["total_steps"] = str(self.total_steps)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def defaults(self) -> frozenset[str]:
        """The names in `describe` whose values are what they are if nothing is said."""
        return frozenset(value.name for value in _flatten(self, "") if value.is_default)

    def places(self) -> dict[str, str]:
        """By name in `describe`, the parameter in a gin file that gives it: `Run.batch_size`."""
        return {value.name: value.parameter for value in _flatten(self, "")}


class _Value(NamedTuple):
    """One of the values that a run consists of: its name, text, whether it is the default."""

    name: str
    text: str
    is_default: bool
    parameter: str  # `Run.batch_size`


def _flatten(value: Any, name: str, is_default: bool = False, parameter: str = "") -> list[_Value]:
    """Everything that a value consists of."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        found = [_Value(f"{name}.kind".lstrip("."), kind, is_default, parameter)]
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            inner = f"{name}.{field.name}".lstrip(".")
            default = is_default or _is_default(field, item)
            found += _flatten(item, inner, default, f"{kind}.{field.name}")
        return found
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}", item) for key, item in sorted(value.items())]
    elif isinstance(value, list | tuple) and any(map(dataclasses.is_dataclass, value)):
        parts = [(f"{name}.{i}", item) for i, item in enumerate(value)]
    else:
        # A function's repr would name its place in memory.
        text = getattr(value, "__qualname__", None) or repr(value)
        return [_Value(name, text, is_default, parameter)]
    return [found for part, item in parts for found in _flatten(item, part, is_default, parameter)]


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return False
