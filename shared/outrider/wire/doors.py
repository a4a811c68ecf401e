"""How nobody new is let in for a moment where a socket listens.

ZeroMQ accepts whatever comes, and to unbind ends what came in there before. But its listening
socket is the kernel's, which can turn people away: a Unix socket has a name, which can be taken
off, and a TCP socket on Linux a filter of what arrives, which can drop all of it. What is connected
already is left alone by both.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

AWAY = ".closed"  # what is put behind the name
ATTACH_FILTER, DETACH_FILTER = 26, 27  # SO_…, as Linux counts them


class Instruction(ctypes.Structure):
    """One of a filter (`sock_filter`); all zero but this code: keep nothing."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class Filter(ctypes.Structure):
    """`sock_fprog`"""

    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(Instruction)))


DROP_ALL = Filter(1, ctypes.pointer(Instruction(code=0x06)))  # BPF_RET | BPF_K


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


def close_door(fd: int) -> None:
    """Let nobody in at this listening socket; where that is not possible, nothing happens."""
    with suppress(OSError), borrowed(fd) as door:
        if door.family == socket.AF_UNIX:
            os.rename(door.getsockname(), door.getsockname() + AWAY)
        elif sys.platform == "linux":
            door.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, bytes(DROP_ALL))


def open_door(fd: int) -> None:
    """Undo `close_door`."""
    with suppress(OSError), borrowed(fd) as door:
        if door.family == socket.AF_UNIX:
            os.rename(door.getsockname() + AWAY, door.getsockname())
        elif sys.platform == "linux":
            door.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)
