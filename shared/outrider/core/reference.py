"""The whole algorithm in one thread: read this first.

The pipeline computes the same, with target and draft at work at the same time and messages between
them. The text depends on target, prompt and sampling alone, whatever the drafter says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outrider.core.decoding import verify
from outrider.core.drafter import Drafter
from outrider.core.engine import Engine
from outrider.core.sampling import Sampling, choose
from outrider.core.values import TokenId


def generate(
    target: Engine, drafter: Drafter, prompt: Sequence[TokenId], sampling: Sampling, n_draft: int
) -> Iterator[list[TokenId]]:
    """What `target` says after `prompt`, block by block, with up to `n_draft` tokens drafted ahead.

    Both use their slot 0, which must be free. It ends behind an end token; otherwise the caller
    must stop iterating before the target's context is full.
    """
    text, stock = list(prompt), list[TokenId]()  # committed; drafted behind it, but not verified
    ends = target.info.vocabulary.ends
    drafter.open(0, sampling, target.info.vocabulary.size)
    while text[-1] not in ends or len(text) == len(prompt):
        block = stock[:n_draft]
        # the target evaluates its last token and the block in one pass …
        for start in range(target.length(0), len(text) - 1, target.info.chunk):
            target.extend(0, text[start : len(text) - 1][: target.info.chunk], 0)
        rows = target.extend(0, [text[-1], *block], len(block) + 1)
        # … and meanwhile, in the pipeline at the same time, the draft rides on behind the block
        while len(stock) <= 2 * n_draft and not set(stock) & set(ends):
            read, drafted = drafter.read(0), drafter.propose(0, text + stock)
            stock += [one.token for one in drafted]
            if not drafted and drafter.read(0) == read:
                break  # it has no idea
        # the target chooses at each row, up to the first choice that was not drafted
        prefixes = (text + block[:n] for n in range(len(block) + 1))
        choices = (choose(row, sampling, p, len(p)) for row, p in zip(rows, prefixes, strict=True))
        committed = list(verify(block, choices, ends).tokens)
        # a hit: the draft has gone on from all of these tokens, the last one too. A miss: the
        # draft's text is rolled back to where it differs, and its stock is void
        same = [one == other for one, other in zip(stock, committed, strict=False)]
        if not all(same):
            drafter.cut(0, len(text) + same.index(False))
            stock = []
        text, stock = text + committed, stock[len(committed) :]
        target.rewind(0, min(target.length(0), len(text) - 1))  # drop what it evaluated in vain
        yield committed
