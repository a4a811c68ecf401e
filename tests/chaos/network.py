"""Links in virtual time between workers, clients and the coordinator; what goes wrong is drawn.

A `Link` here is for its owner what `outrider.wire.transport.Link` is: frames are bytes, and a
connection that ends is told to both sides and made anew. What was under way is lost then.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from outrider.core.values import Drafted, Proposal
from outrider.errors import ProtocolError
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider.wire.transport import LOST, PeerGone

RECONNECT_S = (0.05, 0.4)
BAD_FRAMES = 8  # from one connection, as `outrider.wire.connections` has it
LATER_S = 0.05  # by so much a message that is overtaken comes later, at most
GREETINGS = (b"hello", b"welcome", b"refused", b"who")
TICK_S = 1e-7
BIT_RATE = 4  # bytes of a frame that are damaged, at most


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to the messages of a link; probabilities are of each message."""

    delay_s: tuple[float, float] = (0.0, 0.0)  # from, to
    lost: float = 0.0  # without a word; else a lost message ends its connection
    twice: float = 0.0
    overtaken: float = 0.0
    damaged: float = 0.0  # so that it cannot be read
    lies: float = 0.0  # of a draft

    @property
    def is_orderly(self) -> bool:
        """Whether each message comes, once, and behind the one before."""
        return not (self.lost or self.twice or self.overtaken)


class Heard(NamedTuple):
    """Whom a link tells of what."""

    on_message: Callable[[wire.Message], None]
    on_lost: Callable[[str], None]
    on_up: Callable[[], None]


@dataclass(slots=True)
class Connection:
    """One that is open, between a link and the coordinator of its time."""

    peer: bytes
    link: Link
    is_open: bool = True
    bad_frames: int = 0
    last: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})


class Network:
    """All links. `core` is the coordinator that answers now, None while there is none."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seed: str) -> None:
        self.core: Any = None
        self.is_calm = False  # from now on messages are at most late
        self.seen: Counter[str] = Counter()
        self.links: dict[str, Link] = {}
        self.faults: dict[str, Faults] = {}  # by the beginning of a link's name
        self._loop, self._seed = loop, seed
        self._connections: dict[bytes, Connection] = {}
        self._count = 0

    def link(
        self,
        address: str,
        on_message: Callable[[wire.Message], None],
        on_lost: Callable[[str], None] = lambda _: None,
        on_up: Callable[[], None] = lambda: None,
        credentials: None = None,
    ) -> Link:
        """In place of `transport.Link`; on this network nobody needs keys."""
        name = address.removeprefix("ipc://sim/")
        self._count += 1
        chance = random.Random(f"{self._seed} {name} {self._count}")
        faults = next((one for start, one in self.faults.items() if name.startswith(start)), None)
        heard = Heard(on_message, on_lost, on_up)
        link = self.links[name] = Link(self, name, heard, faults or Faults(), chance)
        return link

    # ---- the coordinator's side -----------------------------------------------------------------

    def send(self, peer: bytes, message: wire.Message) -> None:
        """As `Router.send`."""
        connection = self._connections.get(peer)
        if connection is None or not connection.is_open:
            raise PeerGone("gone")
        connection.link.carry(connection, "down", encode(message))

    def arrived(self, connection: Connection, frame: bytes) -> None:
        """As `Router` handles a frame."""
        if self.core is None:
            return
        try:
            message = decode(frame)
        except ProtocolError:
            self.seen["bad frame"] += 1
            # what it was may be waited for
            connection.link.cut()
            return
        try:
            self.core.on_message(connection.peer, message)
        except ProtocolError:
            self.seen["out of place"] += 1
            connection.bad_frames += 1
            if connection.bad_frames > BAD_FRAMES:
                connection.link.cut()

    def open(self, link: Link) -> Connection:
        self._count += 1
        peer = f"{link.name} {self._count}".encode()
        self._connections[peer] = connection = Connection(peer, link)
        return connection

    def over(self, connection: Connection) -> None:
        """The coordinator is told, if it is still the same."""
        core = self.core
        del self._connections[connection.peer]

        def tell() -> None:
            if core is not None and core is self.core:
                core.on_gone(connection.peer)

        self._loop.call_later(0.002, tell)

    def cut_all(self) -> None:
        for link in list(self.links.values()):
            link.cut()


class Link:
    """One end of a connection: a worker's or a client's."""

    def __init__(
        self,
        network: Network,
        name: str,
        heard: Heard,
        faults: Faults,
        chance: random.Random,
    ) -> None:
        self.name, self.closed, self.held = name, False, False
        self.refusal = self.hindrance = ""  # keys are what these tell of
        self._network, self._faults, self._chance = network, faults, chance
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Callable[[], None]] = []  # while it is held
        self._connection: Connection | None = None
        self._loop.call_soon(self._connect)

    def send(self, message: wire.Message) -> None:
        if self._connection is None:
            raise PeerGone("not connected")
        if self._faults.lies and self._chance.random() < self._faults.lies:
            message = self._lie(message)
        match message:
            case wire.Done(_, Proposal(foreseen=True)):
                self._network.seen["foreseen"] += 1
        self.carry(self._connection, "up", encode(message))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._end()

    def cut(self) -> None:
        """The connection breaks; it is made anew by itself."""
        if self._end() and not self.closed:
            self._network.seen["cut"] += 1
            self._loop.call_later(0.002, self._heard.on_lost, LOST)
            self._loop.call_later(self._chance.uniform(*RECONNECT_S), self._connect)

    def hold(self, seconds: float) -> None:
        """Whoever owns it is paused, or the way is: all comes later, at once."""
        if not self.held:
            self.held = True
            self._loop.call_later(seconds, self._let_go)

    def carry(self, connection: Connection, way: str, frame: bytes) -> None:
        """Bring `frame` to the other side, if nothing happens to it."""
        faults, chance, seen = self._faults, self._chance, self._network.seen
        seen["messages"] += 1
        delay = chance.uniform(*faults.delay_s)
        # timers that are due together come in any order
        due = max(connection.last[way] + TICK_S, self._loop.time() + delay)
        connection.last[way] = due
        drawn = 2.0 if self._network.is_calm else chance.random()
        if (drawn := drawn - faults.lost) < 0:
            seen["lost"] += 1
            return
        if (drawn := drawn - faults.damaged) < 0:
            seen["damaged"] += 1
            frame = damaged(frame, chance)
        elif greets(frame):
            pass  # who greets has no other message under way
        elif (drawn := drawn - faults.twice) < 0:
            seen["twice"] += 1
            later = due + chance.uniform(0.0, LATER_S)
            self._loop.call_at(later, self._arrive, connection, way, frame)
        elif drawn - faults.overtaken < 0:
            seen["overtaken"] += 1
            due += chance.uniform(0.0, LATER_S)
        self._loop.call_at(due, self._arrive, connection, way, frame)

    def _arrive(self, connection: Connection, way: str, frame: bytes) -> None:
        if self.held:
            self._waiting.append(lambda: self._arrive(connection, way, frame))
        elif not connection.is_open:
            self._network.seen["died with its connection"] += 1
        elif way == "up":
            self._network.arrived(connection, frame)
        else:
            try:
                message = decode(frame)
            except ProtocolError:
                self._network.seen["bad frame"] += 1
                self.cut()
                return
            self._heard.on_message(message)

    def _let_go(self) -> None:
        self.held = False
        waiting, self._waiting = self._waiting, []
        for arrive in waiting:
            arrive()

    def _connect(self) -> None:
        if self.closed or self._connection:
            return
        if self._network.core is None:
            self._loop.call_later(self._chance.uniform(*RECONNECT_S), self._connect)
            return
        self._connection = self._network.open(self)
        self._heard.on_up()

    def _end(self) -> bool:
        """Whether there was a connection."""
        connection, self._connection = self._connection, None
        if connection is None:
            return False
        connection.is_open = False
        self._network.over(connection)
        return True

    def _lie(self, message: wire.Message) -> wire.Message:
        """What no honest draft would say."""
        match message:
            case wire.Done(request, Proposal() as said):
                self._network.seen["lie"] += 1
                pick, drafted = self._chance.choice, list(said.drafted)
                if drafted and self._chance.random() < 0.5:
                    token = pick((0, 101, 255, 256, 300, (1 << 31) - 1))
                    drafted[self._chance.randrange(len(drafted))] = Drafted(token, pick((0.0, 1.0)))
                told = said.changed(
                    drafted=tuple(drafted * pick((1, 1, 1, 40))),
                    lineage=max(0, said.lineage + pick((0, 0, 0, -1, 1))),
                    position=max(0, said.position + pick((0, 0, 0, -3, 1, 500))),
                )
                return wire.Done(request, told)
        return message


def greets(frame: bytes) -> bool:
    """Whether it is one of the messages with which a connection begins."""
    return any(word in frame[:12] for word in GREETINGS)


def damaged(frame: bytes, chance: random.Random) -> bytes:
    """The frame with a few other bytes, or cut, so that it is none any more."""
    while True:
        broken = bytearray(frame[: chance.randint(0, len(frame))])
        for _ in range(chance.randint(0, BIT_RATE) if broken else 0):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            decode(bytes(broken))
        except ProtocolError:
            return bytes(broken)
