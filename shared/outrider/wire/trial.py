"""Whether an address with keys is really closed: it is tried before anybody is served.

ZeroMQ fails open. It takes everybody whose messages are encrypted where nobody judges the keys, or
where the domain to judge has no name; so the coordinator itself first knocks as a stranger.
"""

from __future__ import annotations

import asyncio

from outrider.errors import ConfigError
from outrider.wire.keys import Credentials, KeyPair
from outrider.wire.transport import Link

TRIAL_S = 10.0  # most that being refused may take
LOOK_S = 0.005  # between two looks at whether it was
FAILURES = 3  # connections that end before they are made: by chance, so many do not


async def check_closed(address: str, coordinator: bytes) -> None:
    """Raise ConfigError unless strangers are refused at `address`: with a key, and without one."""
    strangers = {"any key": Credentials(KeyPair.random(), coordinator), "no key": None}
    for whose, credentials in strangers.items():
        link = Link(from_here(address), lambda _: None, credentials=credentials)
        try:
            async with asyncio.timeout(TRIAL_S):
                while not (link.is_up or is_refused(link)):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise ConfigError(
                f"{address} is not listened on: within {TRIAL_S:.0f} s it did not refuse a "
                "stranger, so it may be open"
            ) from None
        finally:
            link.close()
        if link.is_up:
            raise ConfigError(f"{address} is not listened on: with {whose} anybody could connect")


def is_refused(link: Link) -> bool:
    """Whether it was told so, or time and again not let through the door."""
    return bool(link.refusal) or link.failures >= FAILURES


def from_here(address: str) -> str:
    """Where this machine reaches what listens at `address`, which may be every address of ours."""
    for everywhere, here in (("0.0.0.0", "127.0.0.1"), ("*", "127.0.0.1"), ("[::]", "[::1]")):
        address = address.replace(f"tcp://{everywhere}:", f"tcp://{here}:")
    return address
