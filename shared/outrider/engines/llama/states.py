"""Taking back from a memory that holds a state of the whole text, and not what each token added.

So do recurrent models (Mamba) and hybrid ones (Qwen3.5, LFM2), in some of their layers or in all:
each token changes the state in place. There are two ways back. For some models llama.cpp keeps the
states after each of the last tokens of a pass (`n_rs_seq` of them): as long as nothing else has
been evaluated, one rewind into that pass costs nothing. Otherwise a checkpoint is restored, a copy
of the state that was taken before, and what came behind it has to be read again. The attention of a
hybrid model keeps what each token added, so it is cut as usual and not copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from outrider.core.engine import Engine, EngineFault, Part
from outrider.core.values import TokenId

APART = 8  # tokens between two checkpoints of a draft: a rewind reads about half of them again …
FAR_APART = 64  # … and of a target, which is taken back to the beginning of a pass, and seldom more
KEPT = 6  # most checkpoints of a text …
ROOM = 2**27  # … and bytes that they take, but for the last two
OFF = 0.1  # of their spread: as different as the same logits can be, where passes differ in rows
BYTES = ctypes.POINTER(ctypes.c_uint8)
PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: without what attention has kept


class Checkpoint(NamedTuple):
    length: int  # the tokens that the state is of
    state: NDArray[np.uint8]


class States:
    """The checkpoints of all slots of a context, and how far each slot can go back without one.

    Everything belongs to the engine's owner thread. `drafts`: passes are of one token, and any
    number of them may be taken back.
    """

    def __init__(self, lib: Any, context: Any, slots: int, drafts: bool) -> None:
        self._lib, self._context = lib, context
        # a sliding window's cache is a part of the state. It is copied at the next pass only, over
        # what has been restored there meanwhile
        self.can_be_copied = not lib.llama_model_n_swa(lib.llama_get_model(context))
        self._apart = APART if drafts else FAR_APART
        self._snapshots: int = lib.llama_n_rs_seq(context)
        self._kept: list[list[Checkpoint]] = [[] for _ in range(slots)]
        self._latest: dict[int, int] = {}  # tokens that the latest pass had for each of its slots
        self._spare: list[NDArray[np.uint8]] = []  # fresh memory is slower to write than used one

    def split(self, parts: Sequence[Part]) -> list[Part]:
        """What of `parts` is to be evaluated before the rest, so that a checkpoint can lie between.

        Else tokens that are certain would be read again with each block that fails behind them.
        """
        return [
            Part(slot, tokens[:-rows], 0)
            for slot, tokens, rows, _ in parts
            if self._may_fail(rows) and len(tokens) - rows >= APART
        ]

    def before(self, parts: Sequence[Part], lengths: Sequence[int]) -> bool:
        """Take the checkpoints that this pass may need; False: it must not be cut short.

        Cut short, a pass leaves states half changed, perhaps also those of other slots where it
        has several.
        """
        self._latest.clear()
        for slot, _, rows, _ in parts:
            length, last = lengths[slot], self._last(slot)
            if length > last and (self._may_fail(rows) or length - last >= self._apart):
                self._take(slot, length)
        (slot, *_), *others = parts
        return not others and self._last(slot) == lengths[slot]

    def after(self, parts: Sequence[Part]) -> None:
        """These have been evaluated."""
        self._latest = {part.slot: len(part.tokens) for part in parts}

    def restore(self, slot: int, length: int, held: int) -> int:
        """Go back from `held` tokens to `length`, or fewer; returns how many there are then.

        The cache is still to be cut to so many tokens, and to be cleared if there are none.
        """
        kept = self._kept[slot]
        while kept and kept[-1].length > length:
            self._drop(kept.pop())
        if held - length <= min(self._snapshots, self._latest.pop(slot, 0) - 1):
            return length
        return self._put(slot, kept[-1]) if kept else 0

    def copy(self, source: int, slot: int, length: int, held: int) -> int:
        """The state in `slot` becomes one of at most `length` of the `held` tokens in `source`.

        Returns how many tokens it is of.
        """
        if length == held > self._last(source):
            self._take(source, held)
        fitting = [one for one in self._kept[source] if one.length <= length]
        if not fitting:
            return 0
        self._kept[slot] = [Checkpoint(fitting[-1].length, fitting[-1].state.copy())]
        return self._put(slot, self._kept[slot][0])

    def forget(self, slot: int) -> None:
        """The slot is empty."""
        while self._kept[slot]:
            self._drop(self._kept[slot].pop())
        self._latest.pop(slot, None)

    def _may_fail(self, rows: int) -> bool:
        """Whether a pass with logits for so many rows may have to go back to its beginning."""
        return rows > 1 + self._snapshots

    def _last(self, slot: int) -> int:
        """How many tokens the last checkpoint is of; with none one can only begin anew."""
        return self._kept[slot][-1].length if self._kept[slot] else 0

    def _take(self, slot: int, length: int) -> None:
        """Keep the state of the `length` tokens that the slot holds, if llama.cpp gives it."""
        size = self._lib.llama_state_seq_get_size_ext(self._context, slot, PARTIAL_ONLY)
        kept = self._kept[slot]
        if len(kept) >= max(2, min(KEPT, ROOM // max(size, 1))):
            self._drop(kept.pop(_least_missed(kept, length)))
        state = self._spare.pop() if self._spare else np.empty(size, np.uint8)
        if len(state) != size:
            state = np.empty(size, np.uint8)
        to = state.ctypes.data_as(BYTES)
        given = self._lib.llama_state_seq_get_data_ext(self._context, to, size, slot, PARTIAL_ONLY)
        if given == size:
            kept.append(Checkpoint(length, state))

    def _drop(self, checkpoint: Checkpoint) -> None:
        if len(self._spare) < KEPT:
            self._spare.append(checkpoint.state)

    def _put(self, slot: int, checkpoint: Checkpoint) -> int:
        """Restore it; returns how many tokens it is of, 0 if llama.cpp does not take it."""
        length, state = checkpoint
        source = state.ctypes.data_as(BYTES)
        taken = self._lib.llama_state_seq_set_data_ext(
            self._context, source, len(state), slot, PARTIAL_ONLY
        )
        return length if taken == len(state) else 0


def goes_back(engine: Engine) -> bool:
    """Whether a pass that is taken back leaves the state of before. Slot 0 is used, and freed."""
    size = engine.info.vocabulary.size
    text: list[TokenId] = [at % size for at in range(APART + 4)]
    try:
        engine.extend(0, text[:APART], 0)
        once = engine.extend(0, text[APART:], 4).copy()
        engine.rewind(0, APART + 2)
        again = engine.extend(0, text[engine.length(0) :], 2).copy()
        engine.rewind(0, 0)
    except EngineFault:
        return False
    return bool(np.abs(once[2:] - again).max() < OFF * once.std())


def _least_missed(kept: Sequence[Checkpoint], length: int) -> int:
    """Which checkpoint to give up at a text of `length` tokens, the last one never.

    The farther back, the farther apart they may lie: then a rewind reads again about as many
    tokens as it takes back, as far as they reach.
    """
    ends = [0, *(one.length for one in kept)]
    gaps = [(ends[at + 2] - ends[at]) / (length - ends[at] + APART) for at in range(len(kept) - 1)]
    return gaps.index(min(gaps))
