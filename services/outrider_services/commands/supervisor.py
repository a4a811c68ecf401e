"""What a supervisor such as systemd is told, if it has asked to be."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(state: str) -> None:
    """Tell it our state, such as "READY=1", as sd_notify(3) does; without one, nobody."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # of the abstract kind, which has no file
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)  # whoever supervises us must not hold us up
        channel.sendto(state.encode(), address)
