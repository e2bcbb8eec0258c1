"""flix_jax: featurized low-rank mixtures (FLix) for T5-family encoder-decoders in JAX."""

__version__ = "0.1.0"
