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
        self._one = np.ones(capacity, np.int32)
        self._ids = np.arange(slots, dtype=np.int32)
        # each row has the address of its slot's number
        self._slots = np.zeros(capacity, np.uint64)
        self.c = lib.llama_batch(
            0,
            pointer(self.tokens, ctypes.c_int32),
            None,
            pointer(self.positions, ctypes.c_int32),
            pointer(self._one, ctypes.c_int32),
            pointer(self._slots, ctypes.POINTER(ctypes.c_int32)),
            pointer(self.wanted, ctypes.c_int8),
        )

    def fill(self, parts: Sequence[Part], lengths: Sequence[int]) -> Any:
        """The C struct for `parts`, whose slots have these `lengths` now."""
        end = 0
        for slot, tokens, rows in parts:
            start, end = end, end + len(tokens)
            self.tokens[start:end] = tokens
            self.positions[start:end] = np.arange(lengths[slot], lengths[slot] + len(tokens))
            self.wanted[start : end - rows] = 0
            self.wanted[end - rows : end] = 1
            self._slots[start:end] = self._ids.ctypes.data + slot * self._ids.itemsize
        self.c.n_tokens = end
        return self.c
