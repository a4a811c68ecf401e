"""Whether a draft fits a target: every token id must mean the same text in both.

Equal fingerprints fit. Otherwise the type of vocabulary and the use of begin and end tokens must be
equal, and these tokens too where they are used. One vocabulary may have up to 128 ids more than the
other, because models are padded. Every common id from 5 on must have the same text. That is
llama.cpp's rule for its own speculative decoding. What ends an answer is the target's alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from outrider.core.engine import Vocabulary
from outrider.errors import IncompatiblePair

PADDING = 128
FIRST_COMPARED = 5
BATCH = 2048  # token texts that are asked for at once

Texts = Callable[[int, int], Awaitable[tuple[str, ...]]]  # of ids start … start + count - 1


async def check_pair(
    target: Vocabulary, draft: Vocabulary, target_texts: Texts, draft_texts: Texts
) -> None:
    """Raise IncompatiblePair for the first difference. Token texts are fetched only if needed."""
    if target == draft:
        return
    for name, ours, theirs, matters in (
        ("vocabulary type", target.kind, draft.kind, True),
        ("use of a begin-of-text token", target.adds_bos, draft.adds_bos, True),
        ("begin-of-text token", target.bos, draft.bos, target.adds_bos),
        ("use of an end-of-text token", target.adds_eos, draft.adds_eos, True),
        ("end-of-text token", target.eos, draft.eos, target.adds_eos),
    ):
        if matters and ours != theirs:
            raise IncompatiblePair(f"the {name} is {ours} in the target, {theirs} in the draft")
    if abs(target.size - draft.size) > PADDING:
        raise IncompatiblePair(
            f"the target has {target.size} tokens, the draft {draft.size}: more than padding apart"
        )
    common = min(target.size, draft.size)
    if target.digest != draft.digest:
        for start in range(FIRST_COMPARED, common, BATCH):
            count = min(BATCH, common - start)
            pairs = zip(
                await target_texts(start, count), await draft_texts(start, count), strict=True
            )
            for token, (ours, theirs) in enumerate(pairs, start):
                if ours != theirs:
                    raise IncompatiblePair(
                        f"token {token} is {ours!r} in the target, {theirs!r} in the draft", token
                    )
