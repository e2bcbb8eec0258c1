"""What bfloat16 leaves of an update beside a layer's output, and of one within its kernel.

    python benchmarks/merged_rounding.py

One dense layer, 768 to 2,048, with an update of rank 8 of several sizes, on 512 inputs in bfloat16:
random ones, and ones that lie half along the columns of A, as those that an adapter has learnt to
tell apart do. Products sum in float32 and are rounded to bfloat16. Beside: product, update and sum
are rounded, each. Merged: kernel and update are added in float32 and rounded, then the product is
(`Run.tables = 'merged'`). The base's kernel is kept in float32 or in bfloat16. For each, the error
of the output over its size, and how much of the update is in it (1 is all, along the exact one).
"""

import argparse
from typing import Any

import ml_dtypes
import numpy as np

D_IN, D_OUT, ROWS, RANK = 768, 2048, 512, 8
SIZES = (1e-4, 1e-3, 1e-2, 1e-1)


def rounded(values: Any) -> np.ndarray:
    """In float64, what bfloat16 keeps."""
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(D_IN, D_OUT)) / D_IN**0.5
    a = rng.normal(size=(D_IN, RANK)) / D_IN**0.5
    b = rng.normal(size=(RANK, D_OUT)) / RANK**0.5
    anywhere = rng.normal(size=(ROWS, D_IN))
    along = rng.normal(size=(ROWS, RANK)) @ a.T * (D_IN / RANK) ** 0.5
    inputs = {"random": anywhere, "along A": (anywhere + along) / 2**0.5}
    print("| base | inputs | update / output | error beside | merged | kept beside | merged |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for base, kept in (("float32", np.float32(kernel)), ("bfloat16", rounded(kernel))):
        for name, x in inputs.items():
            for size in SIZES:
                line = figures(rounded(x), np.asarray(kept, np.float64), a, b * size)
                numbers = " | ".join(f"{number:.4f}" for number in line[1:])
                print(f"| {base} | {name} | {line[0]:.0e} | {numbers} |")


def figures(x: np.ndarray, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    """(size of the update, error beside, merged, how much of the update is kept beside, merged)."""
    update = x @ a @ b
    exact = x @ kernel + update
    without = rounded(x @ rounded(kernel))
    beside = rounded(without + rounded(rounded(x @ rounded(a)) @ rounded(b)))
    merged = rounded(x @ rounded(kernel + rounded(a) @ rounded(b)))
    size = np.linalg.norm(update) / np.linalg.norm(x @ kernel)
    errors = [np.linalg.norm(y - exact) / np.linalg.norm(exact) for y in (beside, merged)]
    kept = [np.sum((y - without) * update) / np.sum(update**2) for y in (beside, merged)]
    return (float(size), *map(float, errors), *map(float, kept))


if __name__ == "__main__":
    main()
