"""Compiled steps timed beside each other: all sides in every round, ratios within a round."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Timed:
    """A compiled step, the gradients that it gave last, and its times.

    Whoever inherits says what the step's `arguments` are, `gradients` among them, and compiles it.
    """

    name: str
    gradients: Any

    def arguments(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def compile(self, step: Callable[..., Any], donated: int) -> None:
        """Compiles a function of the arguments, one of which it may write over."""
        self.times: list[float] = []
        start = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=donated, keep_unused=True)
        self.step: Any = jitted.lower(*self.arguments()).compile()
        print(f"compiled {self.name}: {time.perf_counter() - start:.1f} s", flush=True)

    def run(self, clock: Callable[[], float]) -> None:
        start = clock()
        loss, self.gradients = self.step(*self.arguments())
        jax.block_until_ready((loss, self.gradients))
        self.times.append(clock() - start)
        if not np.isfinite(loss):
            raise RuntimeError(f"{self.name}: loss is {loss}")


def run(sides: Sequence[Timed], rounds: int, clock: Callable[[], float]) -> None:
    """Every side once a round, after two rounds that do not count."""
    for i in range(rounds + 2):
        # Every other round backwards, so that no side always follows the same one.
        for side in sides if i % 2 == 0 else reversed(sides):
            side.run(clock)
    for side in sides:
        del side.times[:2]


def seconds(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Of calls by name, each once a round in turns, after one that does not count.

    A call returns when it is done.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        call()
    for i in range(rounds):
        for name in sides if i % 2 == 0 else reversed(list(sides)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(of) for name, of in times.items()}


def quartiles(ratios: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.3f} [{low:.3f} {high:.3f}]"


def ratios(side: Timed, other: Timed) -> np.ndarray:
    """Within each round."""
    return np.asarray(side.times) / np.asarray(other.times)


def ratio(side: Timed, other: Timed) -> str:
    """Median of the ratios within each round, with the quartiles."""
    return quartiles(ratios(side, other))


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the sizes of the network and of the batch, the rounds and the clock."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--layers", type=int, default=8, help="layers of encoder and of decoder")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--input_length", type=int, default=128)
    made.add_argument("--target_length", type=int, default=32)
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a machine that is shared"
    )
    return made
