"""Milliseconds per row of `choose` and of `propose`, at the vocabulary of the default pair.

    python tests/bench/bench_sampling.py [--vocabulary 151936] [--rows 200]

Rows are made up: a dense bell of unlikely ids and thirty candidates above it, as a language model's
are. "flat" is the bell alone: the worst case, which no trained model comes near.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from outrider.core.sampling import Sampling, Scores, choose, gumbel, propose
from outrider.core.values import Drafted, TokenId

Rule = Callable[[Scores, Sampling, Sequence[int], int], Drafted | TokenId]
SETTINGS = {
    "temperature 0": Sampling(temperature=0),
    "temperature 0.1 (default)": Sampling(),
    "temperature 0.7": Sampling(temperature=0.7),
    "temperature 1": Sampling(temperature=1),
    "temperature 2": Sampling(temperature=2),
    "0.7, top-k 40, top-p 0.95": Sampling(temperature=0.7, top_k=40, top_p=0.95),
    "0.8, top-k 40, top-p 0.95, min-p 0.05": Sampling(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05
    ),
    "0.7, top-p 0.95": Sampling(temperature=0.7, top_p=0.95),
    "0.7, min-p 0.05": Sampling(temperature=0.7, min_p=0.05),
    "default, repetition penalty 1.1": Sampling(repeat_penalty=1.1),
    "0.7, typical 0.9": Sampling(temperature=0.7, typical_p=0.9),
    "0.7, top-n-sigma 1": Sampling(temperature=0.7, top_n_sigma=1),
    "0.7, dynamic ±0.3": Sampling(temperature=0.7, dynatemp_range=0.3),
    "0.7, XTC always": Sampling(temperature=0.7, xtc_probability=1),
    "0.7, DRY": Sampling(temperature=0.7, dry_multiplier=0.8),
}


def make_rows(kind: str, vocabulary: int, count: int, seed: int = 0) -> list[Scores]:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = (random.standard_normal(vocabulary) * 2.5).astype(np.float32)
        if kind == "model":
            row[random.integers(0, vocabulary, 30)] = np.linspace(10, 19, 30)
        rows.append(row)
    return rows


def full(row: Scores, sampling: Sampling, history: Sequence[int], position: int) -> TokenId:
    """What `choose` avoids: noise for every id of the vocabulary."""
    scaled = row.astype(np.float64) / sampling.temperature
    noise = gumbel(sampling.seed, position, np.arange(row.size, dtype="u8"))
    return int(np.argmax(scaled + noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    out = sys.stdout
    out.write(f"numpy {np.__version__}, {options.vocabulary} ids, {options.rows} rows\n")
    out.write(f"{'':44}{'p50 ms':>8}{'p95 ms':>8}\n")
    for kind in ("model", "flat"):
        rows = make_rows(kind, options.vocabulary, 8)
        history = list(range(1000))
        cases: list[tuple[str, Rule, Sampling]] = []
        cases += [(name, choose, sampling) for name, sampling in SETTINGS.items()]
        cases += [(f"draft, {name}", propose, SETTINGS[name]) for name in list(SETTINGS)[:3]]
        cases.append(("default, noise for every id", full, Sampling()))
        for name, rule, sampling in cases:
            spent = []
            for position in range(options.rows):
                row = rows[position % len(rows)]
                begin = time.perf_counter()
                rule(row, sampling, history, position)
                spent.append((time.perf_counter() - begin) * 1e3)
            tenths = statistics.quantiles(spent, n=20)
            out.write(f"{kind + ': ' + name:44}{statistics.median(spent):8.3f}{tenths[18]:8.3f}\n")


if __name__ == "__main__":
    main()
