"""A proxy that knows where messages begin and end, between one peer and the coordinator.

The peer connects to its ROUTER, and its DEALER to the coordinator. On the way messages are late,
lost, repeated, overtaken, damaged, cut or said again later, as a seed draws it. Where a loss must
not go unseen, its connection ends with it, as on a real network.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass

import zmq
from tests.chaos.network import damaged

REMEMBERED = 64  # messages that may be said again
LOOK_MS = 20


@dataclass(frozen=True, slots=True)
class Mischief:
    """Probabilities, of each message; the rest pass."""

    late: float = 0.0
    lost: float = 0.0
    cut: float = 0.0  # lost with its connection
    twice: float = 0.0
    overtaken: float = 0.0
    damaged: float = 0.0  # cut or changed, so that it cannot be read
    again: float = 0.0  # one of the last messages is said once more
    late_s: float = 0.02


# what the text of an answer does not depend on may be treated so, 30 of 100 messages
DRAFT = Mischief(
    late=0.06, lost=0.05, twice=0.05, overtaken=0.05, damaged=0.005, again=0.07, cut=0.002
)
# a target's messages are all needed: none is lost but with its connection
TARGET = Mischief(late=0.2, twice=0.04, overtaken=0.02, again=0.04, damaged=0.0005, cut=0.0005)
CLIENT = Mischief(late=0.3)


class Proxy:
    """`with Proxy(coordinator, mischief, seed) as one`: the peer connects to `one.address`."""

    def __init__(self, coordinator: str, mischief: Mischief, seed: str) -> None:
        self.seen: Counter[str] = Counter()
        self.address = ""
        self._coordinator, self._mischief = coordinator, mischief
        self._rng = random.Random(seed)
        self._context = zmq.Context()
        self._port = 0
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait(5.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._context.destroy(linger=0)

    # ---- its thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            front, back = self._open()
            try:
                _Way(self, front, back, self._rng, self._mischief).carry(self._stop)
            finally:  # both ends see that the connection is over
                front.close(linger=0)
                back.close(linger=0)

    def _open(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        front, back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        for one in (front, back):
            one.setsockopt(zmq.LINGER, 0)
            one.setsockopt(zmq.SNDHWM, 0)
            one.setsockopt(zmq.RCVHWM, 0)
        back.setsockopt(zmq.RECONNECT_IVL, 50)
        while True:
            try:
                front.bind(f"tcp://127.0.0.1:{self._port or '*'}")
                break
            except zmq.ZMQError:  # the last one is not gone yet
                time.sleep(0.01)
        bound = front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._port, self.address = int(bound.rpartition(":")[2]), bound
        back.connect(self._coordinator)
        self._ready.set()
        return front, back


class _Way:
    """One connection's life on both sides."""

    def __init__(
        self,
        proxy: Proxy,
        front: zmq.Socket[bytes],
        back: zmq.Socket[bytes],
        rng: random.Random,
        mischief: Mischief,
    ) -> None:
        self._seen, self._front, self._back = proxy.seen, front, back
        self._rng, self._mischief = rng, mischief
        self._peer = b""
        self._due: list[tuple[float, int, bool, bytes]] = []
        self._said: dict[bool, deque[bytes]] = {
            up: deque(maxlen=REMEMBERED) for up in (True, False)
        }
        self._last = {True: 0.0, False: 0.0}
        self._is_cut = False

    def carry(self, stop: threading.Event) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not (stop.is_set() or self._is_cut):
            wait = LOOK_MS
            if self._due:
                wait = max(0, min(wait, int(1000 * (self._due[0][0] - time.monotonic()))))
            for one, _ in poller.poll(wait):
                self._receive(one)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                _, _, up, frame = heapq.heappop(self._due)
                self._deliver(up, frame)

    def _receive(self, one: zmq.Socket[bytes]) -> None:
        up = one is self._front
        for _ in range(100):
            try:
                parts = one.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if up:
                if parts[0] != self._peer and self._peer:
                    self._is_cut = True  # it has a new connection, and so needs one behind us
                    return
                self._peer = parts[0]
            self._take(up, parts[-1])

    def _take(self, up: bool, frame: bytes) -> None:
        """Decide what becomes of a message."""
        mischief, rng, seen = self._mischief, self._rng, self._seen
        seen["messages"] += 1
        now = time.monotonic()
        due = max(self._last[up], now)
        drawn = rng.random()
        for kind in ("late", "lost", "cut", "twice", "overtaken", "damaged", "again"):
            drawn -= getattr(mischief, kind)
            if drawn < 0:
                seen[kind] += 1
                break
        else:
            kind = "passed"
        match kind:
            case "lost":
                return
            case "cut":
                self._is_cut = True
                return
            case "late":  # and all behind it
                due = max(due, now + rng.uniform(0.0, mischief.late_s))
            case "overtaken":
                self._put(due + rng.uniform(0.0, mischief.late_s), up, frame)
                return
            case "damaged":
                frame = damaged(frame, rng)
            case "twice":
                self._put(due + rng.uniform(0.0, mischief.late_s), up, frame)
            case "again" if self._said[up]:
                self._put(due, up, rng.choice(self._said[up]))
        self._said[up].append(frame)
        self._last[up] = due
        self._put(due, up, frame)

    def _put(self, due: float, up: bool, frame: bytes) -> None:
        self._seen["put"] += 1
        heapq.heappush(self._due, (due, self._seen["put"], up, frame))

    def _deliver(self, up: bool, frame: bytes) -> None:
        if up:
            self._back.send(frame)
        elif self._peer:
            self._front.send_multipart([self._peer, frame])
