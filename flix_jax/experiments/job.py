"""A run in its folder: everything that training, evaluation and inference share."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from flix_jax import buckets
from flix_jax.adapters import (
    injection,
    siblings,
    tables,
    text_tables,
    trained_values,
    tree,
)
from flix_jax.adapters.features import FeatureSpace
from flix_jax.adapters.ids import ABSENT
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.data import cells as cells_lib
from flix_jax.data import overlap
from flix_jax.data.cells import COMPLETE, GENERATE, RETRIEVE, Cell
from flix_jax.data.examples import SOURCES, CellData, DataReport
from flix_jax.data.pipeline import (
    SOURCE_TOKENS,
    TrainPipeline,
    batch_shapes,
)
from flix_jax.data.prefetch import PrefetchIterator
from flix_jax.evaluation import files
from flix_jax.evaluation.batches import GUESSES
from flix_jax.experiments import base as base_lib
from flix_jax.experiments import ensembles, parameter_table, starting_values, table_kinds
from flix_jax.experiments.base import WHOLE
from flix_jax.experiments.run import Run
from flix_jax.experiments.run_folder import (
    check_folder,
    check_held_out,
    features_identity,
    note_changes,
    note_folder,
)
from flix_jax.experiments.scoring import check_evaluation
from flix_jax.mistakes import Collected
from flix_jax.models import int8
from flix_jax.models.encoder_decoder import EncoderDecoder, Layout
from flix_jax.models.t5 import Transformer
from flix_jax.training import optimizers, partitioning
from flix_jax.training.checkpoints import Checkpoints, digest
from flix_jax.training.host_memory import keep_freed_memory
from flix_jax.training.parameters import Parameters
from flix_jax.training.wandb_sink import check_installed

# Entries in the identity of checkpoints.
NONE = "none"

BASES_FILE = "bases.txt"  # in a run's folder: where its base was trained, relative to it

_MESH = ("MeshSpec.data", "MeshSpec.fsdp", "MeshSpec.model")

Predictor = Callable[[dict[str, np.ndarray]], np.ndarray]
_PREDICT_FROM = ("encoder_input_tokens", "feature_ids", SOURCE_TOKENS)


def _bases_dir(run_dir: epath.Path, given: epath.PathLike | None) -> epath.Path:
    if given is not None:
        return epath.Path(given)
    noted = run_dir / BASES_FILE
    return buckets.joined(run_dir, noted.read_text().strip() if noted.exists() else "bases")


class Job:
    """A run and its folder. Making one checks all that can be checked without computing.

    Attributes:
      run, run_dir: what is run, and where.
      mesh: the devices.
      split: the cells that are trained on and those that are held out.
      space: the feature space with its values; None without adapters.
      trained_values: by feature type, the values that are trained; None is all.
      changes: what is allowed to differ from what the folder holds: name -> (there, here).
      model: network, adapters, loss and decoding.
      parameters: what is trained and what is frozen.

    Raises:
      ValueError: whatever in the run cannot work, in one line; `Mistakes` for several things.
    """

    def __init__(
        self,
        run: Run,
        run_dir: epath.PathLike,
        *,
        bases_dir: epath.PathLike | None = None,
        mesh: Any = None,
        allow_changes: Sequence[str] = (),
    ) -> None:
        """See the class.

        Args:
          run, run_dir: see the class.
          bases_dir: where a base that is a run lives; by default where it was trained, and
            ``<run_dir>/bases`` if it was not yet.
          mesh: devices in place of those that are here, to compile for; may be abstract.
          allow_changes: patterns over the values that may differ from what the folder holds
            (`run_folder.check_folder`).
        """
        self.run = run
        self.run_dir = epath.Path(run_dir)
        buckets.check_installed(self.run_dir)
        self._bases_dir = _bases_dir(self.run_dir, bases_dir)
        mistakes = Collected()
        with mistakes.part():
            self.changes = check_folder(run, self.run_dir, allow_changes)
        with mistakes.part("Run.wandb_project"):
            check_installed(run.wandb_project)
        with mistakes.part(*_MESH):
            self.mesh = run.mesh.make() if mesh is None else mesh
            with mistakes.part("Run.batch_size", "Run.microbatches", *_MESH):
                partitioning.check_batch_size(self.mesh, run.batch_size, run.microbatches)
            with mistakes.part("Evaluation.batch_size", *_MESH):
                partitioning.check_batch_size(self.mesh, run.evaluation.batch_size)
        with mistakes.part("Run.vocabulary"):
            run.vocabulary.check_fits(run.model.vocab_size)
        with mistakes.part():
            self.split = run.split()
            self._check_cells(mistakes)
        mistakes.tell()
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        with mistakes.part("FeatureSpace.types", "FeatureType.name", "FeatureType.values"):
            self.space, self.trained_values = self._features()
            ensembles.check(run, self.space)
        if isinstance(run.base, Run):
            with mistakes.part("Run.base"):
                base_lib.check_folds(run.base)
        if run.evaluation.every:
            with mistakes.part("Evaluation.ensemble"):
                ensembles.check_kinds(run, self.split.cells)
        mistakes.tell()
        adapters = run.adapters
        if adapters is not None:
            assert self.space is not None
            adapters = dataclasses.replace(adapters, space=self.space)
        self.model = EncoderDecoder(
            Transformer(run.model),
            adapters,
            label_smoothing=run.label_smoothing,
            z_loss=run.z_loss,
            eos_id=run.vocabulary.eos_id,
            loss_chunks=run.loss_chunks,
            rows_per_cell=run.rows_of_a_cell,
            rows_together=self.rows_together,
            layout=Layout(
                self.mesh.abstract_mesh,
                tuple((n, axes or None) for n, axes in run.mesh.rules.table("activations").items()),
            ),
        )
        self.parameters = Parameters(
            self.model,
            self.batch_shapes(1),
            self.mesh,
            adapters is not None,
            run.trainable,
            run.mesh.rules,
            rows_together=self.rows_together,
            spec=adapters,
            dtype=run.model.dtype,
        )
        with mistakes.part(*_MESH, "AdapterSpec.targets"):
            _ = self.parameters.templates  # shapes, target patterns and shardings
        mistakes.tell()
        with mistakes.part("Run.tables"):
            kinds = table_kinds.of_layers(self)
            if kinds:
                self.parameters = dataclasses.replace(self.parameters, kinds=kinds)
        mistakes.tell()

    def _check_cells(self, mistakes: Collected) -> None:
        """What is said of the cells: held out, rates, transforms, sources, evaluation."""
        run: Any = self.run
        with mistakes.part():
            check_held_out(run, self.split)
        if run.source_text is not None:
            with mistakes.part("Run.source_text"):
                run.source.check_sources(self.split.cells, run.source_text)
        with mistakes.part():
            run.mixture.rates_for(dict.fromkeys(self.split.train, 1))  # do its patterns match?
        with mistakes.part():
            cells_lib.match(tuple(run.transforms), self.split.train, "Run.transforms")
        if run.evaluation.every:
            with mistakes.part("Evaluation.split"):
                self.check_split(run.evaluation.split)
                check_evaluation(run, self.split)

    def _features(self) -> tuple[FeatureSpace | None, dict[str, frozenset[str]] | None]:
        """The feature space with its values, and by type those that are trained (None: all)."""
        run = self.run
        if run.adapters is None:
            return None, None
        columns = cells_lib.columns(self.split.train)
        space = run.adapters.space.complete(columns)
        # An unknown value may be an error; where all are unknown, no adapter would be trained.
        ids = {cell: space.encode(cell.annotations()) for cell in self.split.cells}
        if all((ids[cell] == ABSENT).all() for cell in self.split.train):
            named = ", ".join(f"{t.name}={value}" for t in space.types for value in t.known_values)
            raise ValueError(
                f"FeatureType.values: no cell that is trained on has one of the features {named}"
            )
        if run.train_values is None:
            return space, None
        try:
            return space, trained_values.matching(space, run.train_values, columns)
        except ValueError as error:
            raise ValueError(f"Run.train_values: {error}") from None

    def narrowed(self, space: FeatureSpace) -> tuple[EncoderDecoder, Parameters]:
        """Model and parameters with a space of fewer values of the same types, used in its way."""
        assert self.model.adapters is not None
        adapters = dataclasses.replace(self.model.adapters, space=space)
        model = dataclasses.replace(self.model, adapters=adapters)
        return model, dataclasses.replace(self.parameters, model=model, spec=adapters)

    @property
    def rows_at_once(self) -> int:
        """How many rows a device computes at a time in training."""
        return self.run.batch_size // (partitioning.batch_shards(self.mesh) * self.run.microbatches)

    @property
    def rows_together(self) -> int:
        """How many rows of a cell a device computes as one in training."""
        return math.gcd(self.run.rows_of_a_cell, self.rows_at_once)

    @property
    def lengths(self) -> dict[str, int]:
        """Of the tasks' features, in tokens."""
        lengths = {"inputs": self.run.inputs_length, "targets": self.run.targets_length}
        if self.run.sources_length is not None:
            lengths[SOURCES] = self.run.sources_length
        return lengths

    @property
    def base_dir(self) -> epath.Path | None:
        """Where the base is, or will be; None for random parameters."""
        return base_lib.find(self.run, self._bases_dir)

    def batch_shapes(self, batch_size: int, *, training: bool = True) -> dict[str, tuple[int, ...]]:
        """The shape of every array of a batch, which is never packed but for training."""
        slots = None if self.space is None else self.space.num_slots
        return batch_shapes(
            batch_size,
            self.lengths,
            slots,
            packing=training and bool(self.run.packing),
            examples_per_row=self.run.own_features if training else None,
        )

    @property
    def _texts(self) -> dict[str, Any]:
        """What the registration of tasks takes besides cells."""
        run = self.run
        given: dict[str, Any] = {"vocabulary": run.vocabulary, "space": self.space}
        if run.source_text is not None:
            given["source_text"] = run.source_text
        return given

    def register(self, cells: Iterable[Cell]) -> dict[Cell, str]:
        """Registers the seqio tasks of cells as the run reads them; their names."""
        return self.run.source.register(cells, **self._texts)

    def register_indexes(self, cells: Iterable[Cell]) -> dict[Cell, str]:
        """Registers the passages that retrieval cells are looked up in; the names of the tasks."""
        return self.run.source.register_indexes(cells, **self._texts)

    def check_split(self, split: str, cells: Iterable[Cell] | None = None) -> None:
        """Refuses a split that none of ``cells`` (all by default) has."""
        of = self.run.source.splits
        having = {s for cell in (self.split.cells if cells is None else cells) for s in of(cell)}
        if split not in having:
            raise ValueError(f"no cell has the split {split!r}; {did_you_mean(split, having)}")

    def note_folder(self, step: int = 0) -> None:
        """Writes down what is known before training; from now on the folder is this run's.

        `step` is where training goes on, which is told of what was changed.
        """
        note_changes(self.run_dir, step, self.changes)
        note_folder(self.run, self.run_dir)
        if self.base_dir is not None:
            path = buckets.relative(self._bases_dir, self.run_dir)
            files.write_text(self.run_dir / BASES_FILE, path + "\n")
        kinds = {"frozen": self.frozen_template, "trained": self.parameters.templates[0]}
        table = parameter_table.table(kinds, self.parameters.unsplit)
        files.write_text(self.run_dir / "parameters.txt", table + "\n")
        if self.space is not None:
            files.write_text(self.run_dir / "features.json", self.space.to_json() + "\n")
            files.write_text(self.run_dir / "matched_modules.txt", self.match_table() + "\n")

    def unknown_features(self, cells: Iterable[Cell]) -> dict[str, list[Cell]]:
        """By feature type, the cells whose value training does not know; they run without it."""
        found: dict[str, list[Cell]] = {}
        if self.space is not None:
            for cell in cells:
                for name in self.space.unknown_types(cell.annotations()):
                    found.setdefault(name, []).append(cell)
        return found

    @functools.cached_property
    def matches(self) -> injection.MatchReport:
        """Which modules the adapters matched; the network is traced for it, once."""
        assert self.model.adapters is not None
        return injection.matches(
            self.model.adapters,
            functools.partial(self.model.init, batch_shapes=self.batch_shapes(1)),
            jax.random.key(0),
        )

    def match_table(self) -> str:
        """Which modules the adapters matched, and how many parameters each feature owns."""
        adapters = self.model.adapters
        assert adapters is not None
        counts = tree.adapter_counts(self.parameters.templates[0], adapters.space)
        owned = [["feature", "parameters"]]
        for name, values in counts.items():
            owned += [[f"{name}={value}", f"{count:,}"] for value, count in values.items()]
        kinds, names = self.parameters.kinds, {kind: name for name, kind in tables.KINDS.items()}
        used = {path: names[kind] for path, kind in kinds.items()}
        products = {"Run.tables": lambda path: used.get(path, tables.NONE)}
        parts = [self.matches.table(products), text_tables.plain(owned)]
        groups = siblings.described(self.parameters.siblings)
        if groups:
            parts.append(f"layers of one input are narrowed by one product: {', '.join(groups)}")
        return "\n\n".join(parts)

    @property
    def frozen_template(self) -> Any:
        """The frozen parameters as `jax.ShapeDtypeStruct`, in the dtype that they are kept in."""
        return self.parameters.frozen_template(self.run.frozen_dtype)

    def load_base(self) -> Any | None:
        """The parameters of the base, whole; None for random ones. See `base.load`."""
        return base_lib.load(self)

    def of_base(self, base: Run, mesh: Any = None) -> Job:
        """The job of a base that is a run, where it is trained; `mesh` in place of its own."""
        assert self.base_dir is not None
        return Job(base, self.base_dir, bases_dir=self._bases_dir, mesh=mesh)

    @functools.cached_property
    def comparison(self) -> overlap.Comparison | None:
        """Training beside evaluation data, which are read for it; None where the run ignores it.

        Raises:
          ValueError: the source does not give its texts.
        """
        run, setting = self.run, self.run.mixture.overlap
        if setting == "ignore":
            return None
        if not hasattr(run.source, "pairs"):
            raise ValueError(
                f"Mixture.overlap={setting!r} compares texts, but Run.source="
                f"{type(run.source).__name__} has no method pairs(cell, split); "
                "Mixture.overlap='ignore' does without"
            )
        return overlap.compare(run.source, self.split, drop=setting == "drop")

    def share_comparison(self, other: Job) -> None:
        """Takes over what a job of the same cells has found by reading them."""
        self.__dict__["comparison"] = other.comparison

    def with_model(self, model: EncoderDecoder) -> Job:
        """The same job for another model of the same network, to predict with."""
        other = copy.copy(self)
        other.model = model
        for name in ("_programs", "matches"):
            other.__dict__.pop(name, None)
        return other

    def pipeline(self) -> TrainPipeline:
        """The training examples, read and tokenised; without those that overlap='drop' drops.

        Raises:
          ValueError: nothing is left of a cell, or the source tells other texts than it trains on.
        """
        from flix_jax.data.seqio_tasks import load_cells, register_mixture

        run = self.run
        tasks = self.register(self.split.train)
        read = self.lengths
        if run.read_lengths is not None:
            read |= zip(("inputs", "targets"), run.read_lengths, strict=True)
        compared = self.comparison
        data = load_cells(tasks, read, None if compared is None else compared.dropped)
        self._check_features(data)
        if compared is not None:
            self._check_compared(data, compared.examples)
        rates = run.mixture.rates_for({cell: len(examples) for cell, examples in data.items()})
        # For users of seqio, who find the mixture there that is trained on, nothing dropped.
        register_mixture(f"{run.source.name}.train", {tasks[c]: r for c, r in rates.items()})
        return TrainPipeline(
            data,
            rates,
            lengths=self.lengths,
            global_batch_size=run.batch_size,
            seed=run.order_seed,
            transforms=run.transforms,
            rows=partitioning.local_rows(self.mesh, run.batch_size),
            packing=bool(run.packing),
            examples_per_row=run.own_features,
            rows_per_cell=run.rows_of_a_cell,
            length_buckets=run.lengths_per_side,
        )

    def _check_features(self, data: Mapping[Cell, CellData]) -> None:
        for cell, examples in data.items():
            if self.space is not None and examples.feature_ids is not None:
                try:
                    self.space.validate_ids(examples.feature_ids)
                except ValueError as error:
                    raise ValueError(f"{cell.name}: {error}") from None

    def _check_compared(self, data: Mapping[Cell, CellData], examples: Mapping[str, int]) -> None:
        for cell, held in data.items():
            compared, read = examples[cell.name], len(held) + held.dropped
            if compared != read:
                raise ValueError(
                    f"{cell.name}: {type(self.run.source).__name__}.pairs gives {compared} "
                    f"training examples but its seqio task {read}; expected the same ones"
                )
            if not held:
                raise ValueError(
                    f"{cell.name}: Mixture.overlap='drop' leaves nothing to train on: all of its "
                    f"{read} inputs stand in evaluation data of held-out cells; exclude the cell"
                )

    def batches(self, pipeline: TrainPipeline, step: int) -> PrefetchIterator:
        """Batches on the devices from ``step`` on."""
        put = functools.partial(
            partitioning.put_batch, self.mesh, batch_size=pipeline.global_batch_size
        )
        return PrefetchIterator(pipeline, step, put=put)

    def cells_table(self, report: DataReport) -> str:
        """Training examples per task and language, and which cells are held out or absent."""
        return self.split.table({cell: row.examples for cell, row in report.cells.items()})

    @functools.cached_property
    def start(self) -> starting_values.Start | None:
        """The values of a folder that the adapters start from, where `Run.adapters_from` names one.

        Raises:
          ValueError: they are not of this network and these adapters.
        """
        if self.run.adapters_from is None:
            return None
        assert self.space is not None
        return starting_values.find(self.run, self.space)

    def initial_parameters(self, base: Any | None, *, origin: str | None = None) -> tuple[Any, Any]:
        """(trained, frozen) before the first step; `origin` as for `checkpoints`.

        Raises:
          ValueError: the adapters start from values that were trained beside another base.
        """
        if base is None:
            trained, frozen = self.parameters.random(self.run.seed, self.run.frozen_dtype)
        else:
            trained, frozen = self.parameters.from_base(base, self.run.seed, self.run.frozen_dtype)
        if self.start is not None:
            trained = self.start.into(trained, origin or self.base_digest(base))
        return trained, frozen

    def optimizer(
        self, of_mask: Callable[[Any], Any] = lambda mask: mask
    ) -> optax.GradientTransformation:
        """The run's optimizer, over the values that are trained.

        `of_mask` makes of the mask of `Run.train_values` (the adapters' tree, leaves [values, 1,
        …]) that of some of the values.
        """
        optimizer = self.run.optimizer.build(self.run.total_steps)
        if self.trained_values is None:
            return optimizer
        assert self.space is not None
        shapes = self.parameters.templates[0]
        mask = trained_values.mask(shapes, self.space, self.trained_values)
        return optimizers.masked(optimizer, of_mask(mask))

    def frozen_parameters(self, base: Any | None) -> Any:
        """The second half of ``initial_parameters``, for a run whose trained half is stored."""
        if base is None:
            return self.parameters.random(self.run.seed, self.run.frozen_dtype)[1]
        return self.parameters.frozen_of(base, self.run.frozen_dtype)

    def base_digest(self, base: Any | None) -> str:
        """Names the base in the identity of checkpoints."""
        if self.run.trains_everything:
            return NONE
        return f"random, seed {self.run.seed}" if base is None else digest(base)

    def checkpoints(
        self,
        base: Any | None,
        *,
        create: bool = True,
        origin: str | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> Checkpoints:
        """This run's checkpoints, bound to all that their arrays depend on.

        Args:
          base: the parameters that the run stands on, None for random ones.
          create, warn: as of `Checkpoints`.
          origin: the base's `base_digest`, where that is known already.
        """
        adapters = self.model.adapters
        if adapters is not None:
            trained = f"adapters of {list(adapters.targets)}, alpha {adapters.alpha}"
            if adapters.fusion is not None:
                trained += f", {adapters.fusion}"
        else:
            trained = str(list(self.run.trainable)) if self.run.trainable else WHOLE
        identity = {
            "trained": trained,
            "base": self.base_digest(base) if origin is None else origin,
            "features": NONE if self.space is None else self._features_identity,
            "vocabulary": self.run.vocabulary.digest,
        }
        best = self.run.evaluation.best_by
        return Checkpoints(
            self.run_dir / "checkpoints",
            identity,
            keep=self.run.keep,
            keep_period=self.run.keep_period,
            planned=self.run.saves_at,
            create=create,
            best=best,
            differences={"features": self._features_difference},
            warn=warn,
        )

    @functools.cached_property
    def _features_identity(self) -> str:
        """The feature space as checkpoints know it: as before changes that were allowed."""
        assert self.space is not None
        return features_identity(self.run_dir, self.space, bool(self.changes))

    def _features_difference(self, saved: str) -> str:
        """How the saved feature space differs from the run's own."""
        if saved == NONE or self.space is None:
            return "none there, some here" if saved == NONE else "some there, none here"
        return self.space.difference(FeatureSpace.from_json(saved)) or "as another version wrote it"

    def predictors(self, trained: Any, frozen: Any, settings: Any = None) -> dict[str, Predictor]:
        """By kind of inference: batch of arrays -> what `CellEvaluator.evaluate` asks for.

        `settings` are `EncoderDecoder.settings`: another adapter's dropout rates and scales.

        'generate' gives tokens int32 [batch, targets_length], 'complete' three guesses
        [batch, 3, targets_length] by beam search, 'retrieve' embeddings float32 [batch, embed].
        """

        trained = self.parameters.in_use(trained)

        def predictor(program: Callable[[Any, Any, Any, Any], jax.Array]) -> Predictor:
            def predict(batch: dict[str, np.ndarray]) -> np.ndarray:
                wanted = {k: v for k, v in batch.items() if k in _PREDICT_FROM}
                placed = partitioning.put_batch(self.mesh, wanted)
                return np.asarray(jax.device_get(program(trained, frozen, placed, settings)))

            return predict

        return {kind: predictor(program) for kind, program in self._programs.items()}

    def folded(self, trained: Any, frozen: Any, features: Mapping[str, Any]) -> Any:
        """The base with one set of features folded in, sharded as it was; of int8, in float32."""
        adapters = self.model.adapters
        assert adapters is not None
        shardings = jax.tree.map(lambda x: x.sharding, self.parameters.templates[1])
        fold = jax.jit(
            lambda t, f: tree.fold(int8.dequantise(f), t, adapters, features),
            out_shardings=shardings,
        )
        return fold(trained, frozen)

    @functools.cached_property
    def _programs(self) -> dict[str, Callable[[Any, Any, Any, Any], jax.Array]]:
        """The jitted programs of `predictors`, each compiled when it is first called."""
        length = self.run.targets_length

        def program(of: Callable[[Any, Any, Any], jax.Array]) -> Callable[..., jax.Array]:
            return jax.jit(
                lambda trained, frozen, batch, settings: of(
                    dataclasses.replace(self.model, settings=settings),
                    tree.join(frozen, trained),
                    batch,
                ),
                out_shardings=partitioning.replicated(self.mesh),
            )

        return {
            GENERATE: program(lambda m, p, batch: m.predict(p, batch, max_length=length)),
            COMPLETE: program(
                lambda m, p, batch: m.predict_n(p, batch, max_length=length, beams=GUESSES)[0]
            ),
            RETRIEVE: program(lambda m, p, batch: m.embed(p, batch, normalize=True)),
        }
