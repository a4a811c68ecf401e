"""From token bytes to text that can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Releases text as soon as no later byte can change it.

    It holds back incomplete UTF-8 sequences, and endings that may begin a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, piece: bytes) -> tuple[str, bool]:
        """The text that `piece` releases, and whether a stop string is now complete."""
        self._held += self._decoder.decode(piece)
        return self._release()

    def end(self) -> str:
        """What was still held back, when nothing more will come."""
        self._held += self._decoder.decode(b"", final=True)
        text, stopped = self._release()
        return text if stopped else text + self._held

    def _release(self) -> tuple[str, bool]:
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            self._decoder.reset()  # half a character behind the stop string is not text either
            return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
