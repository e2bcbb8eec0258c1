"""Settings that every test runs under; they have to hold before JAX and TensorFlow are imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
# Collectives of CPU devices wait for each other in one pool of threads: give it more threads than
# devices, and (below) run one program at a time.
os.environ.setdefault("PJRT_NPROC", "32")
# Tests compile much and compute little.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Virtual devices, for meshes. Commands that tests start see the one real device.
NUM_DEVICES = 8
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Shapes in the signatures of these packages are checked on every call that a test makes.
jaxtyping.install_import_hook(["flix_jax.adapters", "flix_jax.models"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with slow tests first: no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# The same examples on every run: a suite that fails fails again.
settings.register_profile(
    "default",
    deadline=None,
    max_examples=20,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# For looking harder at one's own: HYPOTHESIS_PROFILE=thorough
settings.register_profile(
    "thorough", settings.get_profile("default"), max_examples=300, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
