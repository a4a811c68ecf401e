"""The rows of one pass, as llama.cpp takes them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.core.engine import Part


class Batch:
    """The arrays of one call of llama_decode; C reads them where they are, so they never move."""

    def __init__(self, lib: Any, capacity: int, slots: int) -> None:
        def pointer(array: NDArray[Any], to: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(to))

        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.wanted = np.zeros(capacity, np.int8)
        # each row belongs to so many slots, whose numbers stand one behind the other at an address
        self._owners = np.zeros(capacity, np.int32)
        self._addresses = np.zeros(capacity, np.uint64)
        self._ids = np.zeros(slots, np.int32)
        self.c = lib.llama_batch(
            0,
            pointer(self.tokens, ctypes.c_int32),
            None,
            pointer(self.positions, ctypes.c_int32),
            pointer(self._owners, ctypes.c_int32),
            pointer(self._addresses, ctypes.POINTER(ctypes.c_int32)),
            pointer(self.wanted, ctypes.c_int8),
        )

    def fill(self, parts: Sequence[Part], lengths: Sequence[int]) -> Any:
        """The C struct for `parts`, whose slots have these `lengths` now."""
        end = named = 0
        for slot, tokens, rows, forks in parts:
            # who leaves last comes first, so that the owners of a row are the first of the family
            family = [slot, *(one.slot for one in sorted(forks, key=lambda one: -one.length))]
            self._ids[named : named + len(family)] = family
            start, before = end, lengths[slot]
            end = self._add(end, tokens, before, rows, named)
            for fork in forks:
                self._owners[start : start + fork.length - before] += 1
            for fork in forks:
                at = named + family.index(fork.slot)
                end = self._add(end, fork.tokens, fork.length, len(fork.tokens), at)
            named += len(family)
        self.c.n_tokens = end
        return self.c

    def _add(self, start: int, tokens: Sequence[int], before: int, rows: int, owner: int) -> int:
        """Write `tokens`, the first at position `before`, of whose logits the last are wanted."""
        end = start + len(tokens)
        self.tokens[start:end] = tokens
        self.positions[start:end] = np.arange(before, before + len(tokens))
        self.wanted[start : end - rows] = 0
        self.wanted[end - rows : end] = 1
        self._owners[start:end] = 1
        self._addresses[start:end] = self._ids.ctypes.data + owner * self._ids.itemsize
        return end
