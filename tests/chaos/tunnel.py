"""Two hosts on this machine: network namespaces, and between them a link of settable trouble.

The link is a process of ours that carries IP packets from one TUN device to the other. It needs the
rights of a network administrator, and gives everything back in the end.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PREFIX = "10.213.77"  # of addresses that exist in these two namespaces alone
MTU = 1400
DEEPEST = 4096  # packets that may be on their way; more are lost, as on a real link
COMMAND_S = 10.0


@dataclass(frozen=True, slots=True)
class Weather:
    """What the link does to packets, each way."""

    delay_s: float = 0.0  # half of the round trip
    jitter: float = 0.0  # up to so much of the delay more or less
    loss: float = 0.0
    twice: float = 0.0
    stall_s: float = 0.0  # all stands still for so long …
    every_s: float = 0.0  # … so often; 0: never
    bytes_per_s: float = 0.0  # 0: as many as come


def why_not() -> str | None:
    """Why this machine has no two hosts; None if it has."""
    if not Path("/dev/net/tun").exists():
        return "there is no TUN device"
    if os.geteuid() != 0:
        return "namespaces need the rights of a network administrator"
    name = f"or-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        try:
            os.close(_tun(name, "try"))
        finally:
            _ip("netns", "del", name)
    except (OSError, RuntimeError) as exc:
        return f"no namespace with a TUN device can be made: {exc}"
    return None


class Hosts:
    """`with Hosts() as two`: inside, `two.inside(host)` is the beginning of a command there.

    The hosts are 0 and 1; `weather` may be changed at any time.
    """

    def __init__(self, seed: int = 1, weather: Weather | None = None) -> None:
        self.weather = weather or Weather()
        self.names = tuple(f"or-{os.getpid()}-{n}" for n in range(2))
        self.addresses = tuple(f"{PREFIX}.{n + 1}" for n in range(2))
        self.carried = self.lost = 0
        self._rng = random.Random(seed)
        self._fds: list[int] = []
        self._stop, self._began = threading.Event(), time.monotonic()
        self._due: list[tuple[float, int, int, bytes]] = []
        self._free_at = [0.0, 0.0]  # when the link has sent what it has, by direction
        self._thread = threading.Thread(target=self._pump, daemon=True)

    def __enter__(self) -> Hosts:
        try:
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("netns", "add", name)
                self._fds.append(_tun(name, "or0"))
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "or0")
                _ip("-n", name, "link", "set", "or0", "mtu", str(MTU), "up")
                _ip("-n", name, "link", "set", "lo", "up")
            self._thread.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inside(self, host: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[host])

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for name in self.names:
            if Path("/var/run/netns", name).exists():
                _ip("netns", "del", name)

    # ---- the link -------------------------------------------------------------------------------

    def _pump(self) -> None:
        sides = {fd: n for n, fd in enumerate(self._fds)}
        while not self._stop.is_set():
            wait_s = 0.05
            if self._due:
                wait_s = min(wait_s, max(0.0, self._due[0][0] - time.monotonic()))
            for fd in select.select(self._fds, [], [], wait_s)[0]:
                self._take(sides[fd])
            self._deliver()

    def _take(self, side: int) -> None:
        """Read what has come from one host, and say when it is to arrive at the other."""
        weather, rng = self.weather, self._rng
        for _ in range(64):
            try:
                packet = os.read(self._fds[side], 65536)
            except BlockingIOError:
                return
            if len(self._due) >= DEEPEST or rng.random() < weather.loss:
                self.lost += 1
                continue
            for _copy in range(2 if rng.random() < weather.twice else 1):
                heapq.heappush(
                    self._due, (self._when(side, len(packet)), self.carried, 1 - side, packet)
                )
                self.carried += 1

    def _when(self, side: int, size: int) -> float:
        weather, now = self.weather, time.monotonic()
        start = max(now, self._free_at[side])
        if weather.bytes_per_s:
            self._free_at[side] = start = start + size / weather.bytes_per_s
        spread = weather.jitter * weather.delay_s
        due = start + weather.delay_s + self._rng.uniform(-spread, spread)
        if weather.every_s:
            within = (due - self._began) % weather.every_s
            if within < weather.stall_s:
                due += weather.stall_s - within
        return due

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, side, packet = heapq.heappop(self._due)
            try:
                os.write(self._fds[side], packet)
            except OSError:  # its host does not take it
                self.lost += 1


def _ip(*arguments: str) -> None:
    done = subprocess.run(
        ("ip", *arguments), capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _tun(namespace: str, name: str) -> int:
    """A TUN device in this namespace; the descriptor serves the whole process."""
    made: list[int | OSError] = []

    def enter() -> None:
        try:
            made.append(_opened(namespace, name))
        except OSError as exc:
            made.append(exc)

    thread = threading.Thread(target=enter)  # it alone is in that namespace, and ends
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def _opened(namespace: str, name: str) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", namespace).open() as there:
        if library.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(fd, TUNSETIFF, request)
    except OSError:
        os.close(fd)
        raise
    return fd
