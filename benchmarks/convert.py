"""Time and peak memory of `flix convert`, on a random network of a real size.

    python benchmarks/convert.py [--model mt5_base] [--folder DIR]

Writes the network as a checkpoint of T5X's, then converts it to Hugging Face's format and back,
every step in a process of its own. Memory is the peak of the process's resident set, against that
of one which has only imported what converting needs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

LEGS = {"import": "", "write": "t5x", "to_huggingface": "huggingface", "to_t5x": "t5x"}


def work(leg: str, model: str, folder: str) -> None:
    """One step; prints its seconds and the process's peak memory in MiB."""
    import numpy as np

    from flix_jax import configuration
    from flix_jax.experiments import exchange
    from flix_jax.interop import network, t5x_checkpoints
    from flix_jax.interop.leaves import Leaf

    config = configuration.load([f"configs/models/{model}.gin"]).build("T5Config")
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
    elif leg != "import":
        source = f"{folder}/write" if leg == "to_huggingface" else f"{folder}/to_huggingface"
        exchange.convert(source, f"{folder}/{leg}", form=LEGS[leg], say=lambda line: None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.monotonic() - started, "peak": peak}))


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
            print(f"{leg:<15} {found['seconds']:6.1f} s  {found['peak']:7,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
