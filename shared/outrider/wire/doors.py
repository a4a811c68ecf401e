"""How nobody new is let in for a moment where a socket listens.

ZeroMQ accepts whatever comes, and to unbind ends what came in there before. But its listening
socket is the kernel's, which can turn people away: a Unix socket has a name, which can be taken
off, and a TCP socket on Linux a filter of what arrives, which can drop all of it. What is connected
already is left alone by both.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress

AWAY = ".closed"  # what is put behind the name
ATTACH_FILTER, DETACH_FILTER = 26, 27  # SO_…, as Linux counts them
# a filter of one instruction, BPF_RET | BPF_K: keep nothing (`sock_filter`, and `sock_fprog` of it)
DROP = array("H", [0x06, 0, 0, 0])
FILTER = struct.pack("HP", 1, DROP.buffer_info()[0])


@contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """The socket with this descriptor, which stays open. Raises OSError if there is none.

    It takes no further descriptor: there may be none left.
    """
    one = socket.socket(fileno=fd)
    try:
        yield one
    finally:
        one.detach()


def aside(door: socket.socket) -> str:
    """What its name is meanwhile."""
    return os.fsdecode(door.getsockname()) + AWAY


def close_door(fd: int) -> None:
    """Let nobody in at this listening socket; where that is not possible, nothing happens."""
    with suppress(OSError, ValueError), borrowed(fd) as door:  # no file may have the name
        if door.family == socket.AF_UNIX:
            os.rename(door.getsockname(), aside(door))
        elif sys.platform == "linux":
            door.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, FILTER)


def open_door(fd: int) -> None:
    """Undo `close_door`."""
    with suppress(OSError, ValueError), borrowed(fd) as door:  # no file may have the name
        if door.family == socket.AF_UNIX:
            os.rename(aside(door), door.getsockname())
        elif sys.platform == "linux":
            door.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)
