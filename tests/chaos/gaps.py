"""How long clients waited for their next token: usually, and when somebody had just been struck."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict

WINDOW_S = 1.0  # behind a strike


class Gaps:
    """When something came for each client."""

    def __init__(self) -> None:
        self._came: defaultdict[int, list[float]] = defaultdict(list)

    def note(self, client: int, at: float) -> None:
        self._came[client].append(at)

    def longest(self, since: float) -> float:
        """The longest wait of any client that reached into the second from `since` on."""
        return max(
            (_longest(times, since, since + WINDOW_S) for times in self._came.values()), default=0.0
        )

    def has_all(self, since: float) -> bool:
        """Whether every client has had something since."""
        return all(times[-1] > since for times in self._came.values())

    def usual(self, since: float, until: float) -> float:
        """The median of `longest` over the undisturbed seconds between these."""
        seconds = range(int((until - since) // WINDOW_S))
        found = [self.longest(since + n * WINDOW_S) for n in seconds]
        return statistics.median(found) if found else 0.0


def _longest(times: list[float], since: float, until: float) -> float:
    first = max(0, bisect.bisect_right(times, since) - 1)
    longest = 0.0
    for before, after in zip(times[first:], times[first + 1 :], strict=False):
        if before > until:
            break
        longest = max(longest, after - before)
    return longest


def share(values: list[float], part: float) -> float:
    """The value below which this part of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
