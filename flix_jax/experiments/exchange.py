"""Networks from one format into another, and what a run has trained into formats of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flix_jax.adapters import tree
from flix_jax.adapters.suggest import did_you_mean
from flix_jax.experiments import inference, requests
from flix_jax.experiments.job import Job
from flix_jax.experiments.run import Run
from flix_jax.interop import bases, flix_adapters, huggingface, network, peft, t5x_checkpoints
from flix_jax.interop.leaves import Leaf
from flix_jax.models import int8
from flix_jax.models.config import T5Config
from flix_jax.models.encoder_decoder import EncoderDecoder
from flix_jax.training.checkpoints import Step

HUGGINGFACE, T5X, T5X_SCANNED, FLIX, PEFT = "huggingface", "t5x", "t5x_scanned", "flix", "peft"
NETWORKS = (HUGGINGFACE, T5X, T5X_SCANNED)
EXPORTS = (FLIX, *NETWORKS, PEFT)
DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
_COMPARED = (4, 16)  # rows and tokens of the examples by which a folded network is compared

Say = Callable[[str], None]


def convert(
    source: epath.PathLike,
    out: epath.PathLike,
    *,
    form: str,
    dtype: str | None = None,
    family: str = "",
    say: Say = print,
) -> None:
    """Writes a network in another format; a file's worth of it is in memory at a time.

    Args:
      source: a folder of Hugging Face's, or a checkpoint of T5X's.
      out: the folder to make.
      form: one of NETWORKS.
      dtype: of what is written, one of DTYPES; None keeps each array as it is.
      family: of Hugging Face's, where that does not follow from the network.
      say: is told what was found and written.

    Raises:
      ValueError: nothing to read, a network that the format has not, or a folder that is not new.
    """
    _check(form, NETWORKS, "format")
    _check_options(form, dtype, family)
    check_new(out)
    config = bases.config_of(source)
    leaves = bases.read(source, config)
    size = sum(leaf.nbytes for leaf in leaves.values())
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    found = bases.kind(source)
    say(f"{source}: {found}, {count:,} parameters, {size / 2**20:,.0f} MiB: {_summary(config)}")
    _write_network(leaves, config, out, form, dtype=dtype, family=family, step=0)
    say(f"{out}: {form}")


def export(
    run: Run,
    run_dir: epath.PathLike,
    out: epath.PathLike,
    *,
    form: str,
    features: str = "",
    step: Step = None,
    dtype: str | None = None,
    family: str = "",
    bases_dir: epath.PathLike | None = None,
    say: Say = print,
) -> None:
    """Writes what a run has trained.

    Args:
      run, run_dir, step, bases_dir: as in `inference.evaluate`.
      out: the folder to make.
      form: 'flix' for the adapters alone; 'peft' for a LoRA that is one set of features; one of
        NETWORKS for a whole network, with one set of features folded into it if it has adapters.
      features: ``task=ner,language=sw``, the set; ``language=sw:0.7,language=rw:0.3`` with weights.
      dtype, family: as in `convert`.
      say: is told what was written, and of a folded network what rounding did to it.

    Raises:
      ValueError: as `inference.evaluate`; a format that the run has nothing for, features that are
        missing or have no effect, or a folder that is not new.
    """
    _check(form, EXPORTS, "format")
    _check_options(form, dtype, family)
    check_new(out)
    job = Job(run, run_dir, bases_dir=bases_dir)
    adapters = job.model.adapters
    if adapters is None and form in (FLIX, PEFT):
        raise ValueError(f"{run_dir}: the run has no adapters, expected a format of {NETWORKS}")
    whole = adapters is None or form == FLIX
    if not whole and adapters is not None:
        try:
            tree.check_foldable(adapters)
        except ValueError as error:
            raise ValueError(f"{run_dir}: format {form!r}: {error}") from None
    if whole and features:
        reason = "it has no adapters" if adapters is None else f"{FLIX} holds them all"
        raise ValueError(f"features {features!r} have no effect: {reason}")
    chosen = requests.parse_features(features, job.space)
    if not whole and not chosen:
        raise ValueError(
            f"{form} holds one set of features: name it with --features, of "
            + ", ".join(job.space.names if job.space else ())
        )
    if form == FLIX:
        own = _adapters(job, step)
        own.write(out)
        say(f"{out}: {form}, step {own.step}")
        return
    trained, frozen, found = inference.restore(job, step)
    if form == PEFT:
        assert adapters is not None
        _write_peft(job, trained, chosen, out, dtype)
    else:
        whole_base = int8.dequantise(frozen)
        params = tree.join(whole_base, trained) if adapters is None else whole_base
        if adapters is not None:
            params = tree.fold(whole_base, trained, adapters, chosen)
            say(_rounding(job, tree.join(frozen, trained), params, chosen))
        leaves = {n: Leaf.of(x, n) for n, x in network.flat(params).items()}
        fitted = network.fit(leaves, run.model, str(run_dir))
        _write_network(fitted, run.model, out, form, dtype=dtype, family=family, step=found)
    say(f"{out}: {form}, step {found}" + (f", {features}" if features else ""))


def adapters_of(
    run: Run, run_dir: epath.PathLike, *, bases_dir: epath.PathLike | None = None
) -> flix_adapters.Adapters:
    """What `export` writes as 'flix', of the newest step; arguments as there.

    Raises:
      ValueError: as `inference.evaluate`; the run has no adapters.
    """
    job = Job(run, run_dir, bases_dir=bases_dir)
    if job.model.adapters is None:
        raise ValueError(f"{run_dir}: the run has no adapters")
    return _adapters(job, None)


def _check(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; {did_you_mean(value, known)}")


def _check_options(form: str, dtype: str | None, family: str) -> None:
    """What is written otherwise than it is, before anything is read for it."""
    if family and form != HUGGINGFACE:
        raise ValueError(f"family {family!r} has no effect on {form}")
    if dtype is not None:
        _check(dtype, tuple(DTYPES), "dtype")


def check_new(out: epath.PathLike) -> None:
    """ValueError where something is at the place of a folder that is to be made."""
    out = epath.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already, expected a new or empty folder")


def _summary(config: T5Config) -> str:
    output = "tied output" if config.logits_via_embedding else "output of its own"
    return (
        f"width {config.emb_dim}, {config.num_heads} heads of {config.head_dim}, feed-forward "
        f"{config.mlp_dim} ({', '.join(config.mlp_activations)}), {config.num_encoder_layers} + "
        f"{config.num_decoder_layers} layers, vocabulary {config.vocab_size:,}, {output}"
    )


def _write_network(
    leaves: Mapping[str, Leaf],
    config: T5Config,
    out: epath.PathLike,
    form: str,
    *,
    dtype: str | None,
    family: str,
    step: int,
) -> None:
    kind = None if dtype is None else DTYPES[dtype]
    if form == HUGGINGFACE:
        # What a scanned network keeps in every layer, from a shared one, is shared there again.
        own = config.relative_positions_in_layers and not network.positions_are_equal(leaves)
        stored = dataclasses.replace(config, scan_layers=False, relative_attention_per_layer=own)
        fitted = network.fit(leaves, stored, str(out))
        huggingface.write(fitted, stored, out, family=family, dtype=kind)
        return
    if form == T5X_SCANNED:
        stored = dataclasses.replace(config, scan_layers=False, relative_attention_per_layer=True)
        leaves = t5x_checkpoints.scanned(network.fit(leaves, stored, str(out)), stored)
    t5x_checkpoints.write(leaves, out, step=step, dtype=kind)


def _adapters(job: Job, step: Step) -> flix_adapters.Adapters:
    adapters = job.model.adapters
    assert adapters is not None and job.space is not None
    base = job.load_base()
    origin = job.base_digest(base)
    with job.checkpoints(base, create=False, origin=origin) as checkpoints:
        trained, found = checkpoints.restore_trained(job.parameters.templates[0], step)
    return flix_adapters.Adapters(
        {name: Leaf.of(bank, name) for name, bank in network.flat(trained).items()},
        job.space,
        adapters.alpha,
        tuple(adapters.targets),
        dataclasses.asdict(job.run.model),
        origin,
        job.run.vocabulary.digest,
        found,
        adapters.fusion,
    )


def _write_peft(
    job: Job, trained: Any, features: Mapping[str, Any], out: epath.PathLike, dtype: str | None
) -> None:
    adapters = job.model.adapters
    assert adapters is not None
    halves = {}
    for path, pair in tree.updates(trained, adapters, features).items():
        for side, half in zip("ab", pair, strict=True):
            stacked = half.ndim == 3  # by a scan: as parameters are, on axis 1
            leaf = Leaf.of(jnp.moveaxis(half, 0, 1) if stacked else half)
            halves["/".join((*path, side))] = leaf
    found = {name: leaf.read() for name, leaf in network.unscanned(halves).items()}
    layers = dict.fromkeys(name.rpartition("/")[0] for name in found)
    updates = {name: peft.LowRank(found[f"{name}/a"], found[f"{name}/b"]) for name in layers}
    kind = np.float32 if dtype is None else DTYPES[dtype]
    base = None if job.base_dir is None else str(job.base_dir)
    peft.write(updates, job.run.model, out, base=base, dtype=kind)


def _rounding(job: Job, adapted: Any, folded: Any, features: Mapping[str, Any]) -> str:
    """How far the folded network is from the adapted one, as it is and rounded to bfloat16."""
    adapters = job.model.adapters
    assert adapters is not None
    space = adapters.space.room_for([features])
    model = dataclasses.replace(job.model, adapters=dataclasses.replace(adapters, space=space))
    rng = np.random.default_rng(0)
    shape = _COMPARED
    tokens = rng.integers(2, job.run.model.vocab_size, (3, *shape)).astype(np.int32)
    batch = {
        "encoder_input_tokens": tokens[0],
        "decoder_input_tokens": tokens[1],
        "decoder_target_tokens": tokens[2],
    }
    ids, weights = (np.tile(one, (shape[0], 1)) for one in space.encode_weighted(features))
    plain = EncoderDecoder(job.model.module)
    chosen = {"feature_ids": ids, "feature_weights": weights}
    exact = jax.jit(model.logits)(adapted, batch | chosen)
    largest = jnp.abs(exact).max()
    logits = jax.jit(plain.logits)

    def apart(params: Any) -> float:
        return float(jnp.abs(logits(params, batch) - exact).max() / largest)

    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), folded)
    return (
        f"folded: logits of random tokens differ by {apart(folded):.1e} of the largest, with the "
        f"weights rounded to bfloat16 by {apart(rounded):.1e}"
    )
