"""`python -m flix_jax.cli`."""

import sys

from flix_jax.cli import console

sys.exit(console())
