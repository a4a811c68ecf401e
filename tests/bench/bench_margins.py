"""How far rounding moves a choice: what `sampling.NEAR` has to be above.

The same greedy text is evaluated a row at a time and in blocks of other lengths. Of each choice the
lead over the next likeliest token is compared: what it moved by is what a near-tie is decided by.

Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_margins [MODEL.gguf]`.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.oracle import alone

from outrider.core.sampling import NEAR, Sampling, Scores
from outrider.engines.llama.engine import LlamaEngine, LlamaSettings
from outrider_services.models import catalogue

PROMPTS = ("The future of AI is", "Write a Python function that merges two sorted lists.\n")
COUNT, BLOCKS = 160, (2, 3, 4, 5, 6, 8, 9, 12, 16)
RIVALS = 2  # how many of the likeliest tokens are compared


def leads(rows: Scores, of: NDArray[np.intp]) -> NDArray[np.float64]:
    """[row]: by how much the first of the tokens `of` [row, RIVALS] leads the second."""
    picked = np.take_along_axis(np.asarray(rows), of, axis=1).astype(np.float64)
    lead: NDArray[np.float64] = picked[:, 0] - picked[:, 1]
    return lead


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else catalogue.find(catalogue.DEFAULT_TARGET)
    assert path, "pull the default models first"
    engine = LlamaEngine.load(path, LlamaSettings(context=1024, slots=1, threads=2))
    moved: dict[int, list[float]] = {block: [] for block in BLOCKS}
    for prompt in PROMPTS:
        engine.rewind(0, 0)
        text = engine.tokenize(prompt, special=True)
        answer = list(islice(alone(engine, text, Sampling(temperature=0)), COUNT))
        engine.rewind(0, len(text) - 1)
        tokens = [text[-1], *answer[:-1]]
        single = np.concatenate([engine.extend(0, [token], 1).copy() for token in tokens])
        order = np.argsort(single, axis=1)[:, : -RIVALS - 1 : -1]
        before = leads(single, order)
        for block in BLOCKS:
            engine.rewind(0, len(text) - 1)
            for at in range(0, len(tokens) - block + 1, block):
                rows = engine.extend(0, tokens[at : at + block], block)
                after = leads(rows, order[at : at + block])
                moved[block] += list(np.abs(after - before[at : at + block]))
    for block, of in moved.items():
        worst, usual = max(of), float(np.quantile(of, 0.99))
        print(f"{block:3} rows: 99 % below {usual:.3f}, most {worst:.3f} logits of {len(of)}")
    print(f"NEAR is {NEAR}")


if __name__ == "__main__":
    main()
