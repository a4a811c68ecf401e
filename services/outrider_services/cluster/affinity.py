"""Which replica has read what: requests that begin alike go to the same one, as far as it has room.

A replica keeps what it has read (`pipeline.slots`), so a text that goes on behind that costs the
reading of its end alone. A request is known by the digests of its beginnings, the longest last;
they differ for different API keys, which share nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from outrider_services.gateway.asking import Ask, Gap

PIECE = 512  # characters, or token ids, of a plain prompt from one beginning to the next
MOST_BEGINNINGS = 64  # of one request: the longest ones
MOST_KNOWN = 65536  # beginnings that are remembered, the latest used
# requests more than the idlest replica has, for which one without a free sequence is preferred
PATIENCE = 2


def beginnings(ask: Ask, key: str) -> tuple[str, ...]:
    """Digests of what the request's text begins with, the shortest first."""
    if ask.messages is not None:
        pieces = [json.dumps(one, sort_keys=True, default=str) for one in ask.messages]
        pieces[:0] = [json.dumps(ask.tools, sort_keys=True, default=str)] if ask.tools else []
    else:
        prompt = ask.prompt.prefix if isinstance(ask.prompt, Gap) else ask.prompt
        parts = (prompt[at : at + PIECE] for at in range(0, len(prompt), PIECE))
        pieces = [one if isinstance(one, str) else json.dumps(list(one)) for one in parts]
    digest, found = hashlib.blake2b(key.encode(), digest_size=12), []
    for piece in pieces:
        digest.update(f"{len(piece)} {piece}".encode())
        found.append(digest.hexdigest())
    return tuple(found[-MOST_BEGINNINGS:])


class Affinity:
    """What is remembered of where requests went."""

    def __init__(self, places: int) -> None:
        """`places`: sequences of each replica."""
        self._places = places
        self._known: OrderedDict[str, str] = OrderedDict()  # a beginning: the replica that read it

    def ranked(self, begins: Sequence[str], loads: Mapping[str, int]) -> list[list[str]]:
        """The replicas by preference, given how many requests each of them has.

        First the one that knows most of the text, unless all of its sequences are taken and it is
        busier than the idlest; then the others, the idlest first.
        """
        if not loads:
            return []
        least = min(loads.values())
        found = [
            [name for name in loads if loads[name] == load] for load in sorted({*loads.values()})
        ]
        for one in reversed(begins):
            name = self._known.get(one, "")
            if name in loads:
                if loads[name] < max(self._places, least + PATIENCE):
                    rest = ([other for other in rank if other != name] for rank in found)
                    return [[name], *filter(None, rest)]
                break
        return found

    def routed(self, begins: Sequence[str], name: str) -> None:
        """The request went to this replica, which knows its text from now on."""
        for one in begins:
            self._known[one] = name
            self._known.move_to_end(one)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
