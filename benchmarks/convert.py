"""Time and peak memory of `flix convert` and of reading a base, on a random network of a real size.

    python benchmarks/convert.py [--model mt5_base] [--folder DIR]

Writes the network as a checkpoint of T5X's, then converts it to Hugging Face's format and back, and
reads both as a run reads its base, every step in a process of its own. Memory is the peak of what
the process has for itself (RssAnon: without pages of files, which the system takes back when it
needs them). Of reading also what the peak is above the parameters, in terms of the largest array.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

CONVERTED = {"to_huggingface": "huggingface", "to_t5x": "t5x"}
READ = {
    "read_t5x": ("to_t5x", "float32"),
    "read_t5x_bfloat16": ("to_t5x", "bfloat16"),
    "read_huggingface": ("to_huggingface", "float32"),
    "read_huggingface_bfloat16": ("to_huggingface", "bfloat16"),
}
LEGS = ("import", "write", *CONVERTED, *READ)


class Memory:
    """The peak of a process's own memory, looked at every few milliseconds; MiB."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now() -> float:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)


def work(leg: str, model: str, folder: str) -> None:
    """One step; prints its seconds and the process's peak memory in MiB."""
    import jax
    import numpy as np

    from flix_jax import configuration
    from flix_jax.experiments import exchange
    from flix_jax.interop import bases, network, t5x_checkpoints
    from flix_jax.interop.leaves import Leaf

    config = configuration.load([f"configs/models/{model}.gin"]).build("T5Config")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    memory, before = Memory(), Memory.now()
    found: dict[str, float] = {}
    started = time.monotonic()
    if leg == "write":
        rng = np.random.default_rng(0)

        def drawn(shape: tuple[int, ...]) -> Leaf:
            return Leaf(
                shape,
                np.dtype(np.float32),
                lambda index: rng.normal(size=[s.stop - s.start for s in index]),
            )

        leaves = {name: drawn(shape) for name, shape in network.shapes(config).items()}
        t5x_checkpoints.write(leaves, f"{folder}/write")
    elif leg in CONVERTED:
        source = f"{folder}/write" if leg == "to_huggingface" else f"{folder}/to_huggingface"
        exchange.convert(source, f"{folder}/{leg}", form=CONVERTED[leg], say=lambda line: None)
    elif leg in READ:
        source, dtype = f"{folder}/{READ[leg][0]}", np.dtype(READ[leg][1])
        template = network.nested(
            {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
                for name, shape in network.shapes(config).items()
            }
        )
        params = jax.block_until_ready(bases.load_parameters(source, config, template))
        sizes = [leaf.nbytes / 2**20 for leaf in jax.tree.leaves(params)]
        stored = max(leaf.nbytes for leaf in bases.read(source, config).values()) / 2**20
        found = {"above": (memory.peak - before - sum(sizes)) / stored, "largest": stored}
    found |= {"seconds": time.monotonic() - started, "peak": memory.peak}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mt5_base")
    parser.add_argument("--folder", help="where there is room; by default a temporary one")
    parser.add_argument("--leg", choices=LEGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.leg:
        work(arguments.leg, arguments.model, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for leg in LEGS:
            command = [sys.executable, __file__, f"--leg={leg}", f"--model={arguments.model}"]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(
                [*command, f"--folder={folder}"], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            above = f"  {found['above']:.2f} of the largest array" if "above" in found else ""
            print(
                f"{leg:<26}{found['seconds']:6.1f} s  {found['peak']:7,.0f} MiB{above}", flush=True
            )


if __name__ == "__main__":
    main()
