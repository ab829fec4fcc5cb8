"""Time the exact greedy selection against LAPACK's pivoted Cholesky factorisation on the same matrices.

Both pick m/2 of m nodes.  dpstrf factors one matrix and cannot stop half-way, so it pivots over all m; the greedy rule
stops at m/2 but updates two matrices, and for theta < 1 has more products to form before.  For a like-for-like figure,
the table also shows the greedy rule for all m.  The seconds are those of the processor, summed over threads.  Repeats
are interleaved, so that a busy machine slows both; the medians are reported.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import lapack

from specprune._files import write_text
from specprune._records import format_table, to_json
from specprune.compress.selection import greedy_nodes


def relu_gram(size: int, seed: int, samples_per_node: int = 2) -> np.ndarray:
    """Return the second moment of `size` random ReLU features of inputs with a power-law spectrum."""
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((samples_per_node * size, 256)) * np.arange(1, 257) ** -0.5
    features = np.maximum(inputs @ generator.standard_normal((256, size)), 0.0)
    return features.T @ features / len(features)


def timed(function, *args, **options):
    start = time.process_time()
    function(*args, **options)
    return time.process_time() - start


def measure(size: int, repeats: int, seed: int) -> dict[str, float | int]:
    """Return the median seconds of both programs on one matrix, and their ratios."""
    gram = relu_gram(size, seed)
    weights = np.random.default_rng(seed + 1).standard_normal((size, size))
    consumer = weights.T @ weights
    fortran = np.asfortranarray(gram)
    tau = np.full(size, 1e-6 * np.trace(gram))
    programs = {
        "dpstrf": lambda: lapack.dpstrf(fortran, lower=1, tol=-1.0),
        "output_half": lambda: greedy_nodes(gram, consumer, size // 2, tau=tau, theta=0.0),
        "input_half": lambda: greedy_nodes(gram, consumer, size // 2, tau=tau, theta=1.0),
        "input_all": lambda: greedy_nodes(gram, consumer, size, tau=tau, theta=1.0),
    }
    for run in programs.values():
        run()  # warm caches and thread pools
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            seconds[name].append(timed(run))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "m": size,
        **{f"{name}_s": value for name, value in medians.items()},
        **{f"ratio_{name}": value / medians["dpstrf"] for name, value in medians.items() if name != "dpstrf"},
        "spread": max(float(np.ptp(values)) / medians[name] for name, values in seconds.items()),
    }


def growth(rows, key: str) -> float:
    """Return the exponent p of seconds ~ m^p, by least squares of the logarithms."""
    if len(rows) < 2:
        return float("nan")
    return float(np.polyfit(np.log([row["m"] for row in rows]), np.log([row[key] for row in rows]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="numbers of nodes m")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the matrices")
    parser.add_argument("--out", type=Path, help="folder for greedy_speed.json")
    args = parser.parse_args()
    if args.repeats < 1 or min(args.sizes) < 2:
        parser.error("expected at least 1 repeat and sizes of at least 2")
    rows = [measure(size, args.repeats, args.seed) for size in sorted(args.sizes)]
    exponents = {key.removesuffix("_s"): growth(rows, key) for key in rows[0] if key.endswith("_s")}
    print(
        format_table(
            rows,
            title="median seconds; output: theta = 0, input: theta = 1; ratio to dpstrf; spread = (max - min) / median",
        )
    )
    print("growth exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in exponents.items()))
    if args.out is not None:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        payload = {
            "rows": rows,
            "growth_exponents": exponents,
            "seed": args.seed,
            "repeats": args.repeats,
            "matrix": "second moment of random ReLU features, 256 inputs of standard deviation j^-1/2, 2 m samples",
            "versions": {"python": platform.python_version(), **{n: version(n) for n in ("numpy", "scipy", "torch")}},
            "device": {
                "machine": platform.machine(),
                "processor": platform.processor() or "unknown",
                "cpus": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "blas": f"{blas['name']} {blas['version']}",
                "thread_variables": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
            },
        }
        path = args.out / "greedy_speed.json"
        write_text(path, to_json(payload) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
