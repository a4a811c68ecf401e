"""`outrider keys`: make, show and trust the keys of links beyond this machine."""

from __future__ import annotations

import sys
from typing import Any

from outrider.errors import ConfigError
from outrider.wire.keys import HOLDERS, LIMIT, Keyring, Trusted, trusted_in
from outrider.wire.rights import KEY_ROLES
from outrider_services.options import Parser
from outrider_services.table import Settings
from outrider_services.terminal import tell


def new_flags(parser: Parser) -> None:
    parser.description = (
        "Make a secret key of each ROLE, readable by you alone, and print its public key: a line "
        "for `outrider keys trust` on the other machine. One that is there already stays."
    )
    parser.add_argument("roles", nargs="+", choices=HOLDERS, metavar="ROLE", help=roles())


def show_flags(parser: Parser) -> None:
    parser.description = (
        "Print the public keys that are here, a line each, for `outrider keys trust` on the other "
        "machine; with --trusted, those of others that are trusted here."
    )
    add = parser.add_argument
    add("roles", nargs="*", metavar="ROLE", help=f"only of these: {roles()}")
    add("--trusted", action="store_true", help="the keys that are trusted here")


def trust_flags(parser: Parser) -> None:
    parser.description = (
        "Trust the public keys in the lines on standard input, as `outrider keys new` and `show` "
        "print them. If they are to connect to a coordinator here, print its public key in return "
        "(made if there is none), for `outrider keys trust` where they are."
    )
    parser.add_argument(
        "--at", default="", metavar="ADDRESS", help="trust a coordinator for this address alone"
    )


def roles() -> str:
    return f"coordinator, which listens, or who connects: {', '.join(KEY_ROLES)}"


def new(settings: Settings, parsed: Any) -> int:
    ring = Keyring(settings.links.keys)
    for holder in dict.fromkeys(parsed.roles):
        if ring.has(holder):
            tell(f"There is a key of the role {holder} in {ring.directory}: it stays.")
        else:
            ring.make(holder)
            tell(f"Made a key of the role {holder} in {ring.directory}.")
        print(ring.own(holder).line)
    return 0


def show(settings: Settings, parsed: Any) -> int:
    ring = Keyring(settings.links.keys)
    if wrong := [one for one in parsed.roles if one not in HOLDERS]:
        raise ConfigError(f"{wrong[0]!r} is no role of a key: there are {', '.join(HOLDERS)}")
    asked = parsed.roles or HOLDERS
    if parsed.trusted:
        found = [one for one in ring.trusted() if one.holder in asked]
    else:  # what was asked for by name is an error where it is not there
        found = [ring.own(one) for one in asked if parsed.roles or ring.has(one)]
    if not found:
        tell(f"There is none in {ring.directory}.")
    for one in found:
        print(one.line)
    return 0


def trust(settings: Settings, parsed: Any) -> int:
    ring = Keyring(settings.links.keys)
    if sys.stdin.isatty():
        tell("Paste what `outrider keys show` prints on the other machine, then Ctrl-D.")
    found = trusted_in(sys.stdin.read(LIMIT))
    if not found:
        raise ConfigError("no public key came on standard input, so none is trusted")
    if parsed.at:
        found = tuple(at(one, parsed.at) for one in found)
    before = ring.trusted()
    ring.trust(found)
    for one in found:
        tell(f"Trusted in {ring.directory}: {one.holder} {' '.join(one.remarks)}")
    for one in set(before) - set(ring.trusted()):
        tell(f"In place of another key: {one.line}")
    if any(one.holder != "coordinator" for one in found):
        if not ring.has("coordinator"):
            ring.make("coordinator")
        print(ring.own("coordinator").line)
    return 0


def at(one: Trusted, address: str) -> Trusted:
    """The coordinator `one`, for this address alone. Raises ConfigError if it is none."""
    if one.holder != "coordinator" or not address.startswith("tcp://"):
        raise ConfigError("--at says at which tcp:// address a coordinator is to be trusted")
    remarks = tuple(remark for remark in one.remarks if "://" not in remark)
    return Trusted(one.holder, one.public, (*remarks, address))
