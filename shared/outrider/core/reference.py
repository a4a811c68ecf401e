"""The whole algorithm in one thread: read this first.

The pipeline, where both work at once and the length of blocks varies, commits the same text: it
depends on target, prompt and sampling alone, not on what is drafted. (Left out here: the sequence
breakers of DRY, for which the workers look through the vocabulary.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outrider.core.decoding import verify
from outrider.core.drafter import Drafter, Opening
from outrider.core.engine import Engine
from outrider.core.sampling import Sampling, choose
from outrider.core.values import TokenId


def generate(
    target: Engine, drafter: Drafter, prompt: Sequence[TokenId], sampling: Sampling, n_draft: int
) -> Iterator[list[TokenId]]:
    """What `target` says after `prompt`, block by block, verifying up to `n_draft` tokens at once.

    Both use their slot 0, which has to be empty. Ends after an end token; otherwise whoever
    iterates stops before the target's context is full.
    """
    text, stock = list(prompt), list[TokenId]()  # committed; drafted after it, not yet verified
    ends, chunk = target.info.vocabulary.ends, target.info.chunk
    for start in range(0, len(text) - 1, chunk):  # the prompt, but for its last token
        target.extend(0, text[start:-1][:chunk], 0)
    drafter.open(0, Opening(sampling, target.info.vocabulary.size))
    while text[-1] not in ends or len(text) == len(prompt):
        # the target evaluates its last token and a block of drafted ones in one pass …
        block = stock[:n_draft]
        rows = target.extend(0, [*text[target.length(0) :], *block], len(block) + 1)
        # … while, in the pipeline at the same time, the draft goes on. What it drafts just after
        # the block is its guess of the target's own token; the rest is the next block
        while len(stock) < n_draft + 1 + n_draft and not set(stock) & set(ends):
            held = drafter.read(0)  # a long text is taken in in parts
            drafted = drafter.propose(0, text + stock)
            stock += [one.token for one in drafted]
            if not drafted and drafter.read(0) == held:
                break  # it has no idea
        # the target chooses row by row, until its choice is not what was drafted there
        prefixes = (text + block[:n] for n in range(len(block) + 1))
        choices = (choose(row, sampling, p, len(p)) for row, p in zip(rows, prefixes, strict=True))
        committed = list(verify(block, choices, ends).tokens)
        # a hit, or no stock: what is left of it is the next block. A miss: the draft is rolled back
        # to the first difference, and the next pass, without a block, commits one token
        agrees = [one == other for one, other in zip(stock, committed, strict=False)]
        if not all(agrees):
            drafter.cut(0, len(text) + agrees.index(False))
            stock = []
        text, stock = text + committed, stock[len(committed) :]
        target.rewind(0, len(text) - 1)  # drops refused tokens; the last is read next
        yield committed
