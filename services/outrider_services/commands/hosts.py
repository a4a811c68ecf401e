"""What of a configuration belongs on this machine: one file may describe several."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, replace

import psutil

from outrider.core.values import Role
from outrider.errors import ConfigError
from outrider.wire.addresses import is_local
from outrider_services.pipeline.arguments import own_settings
from outrider_services.table import Place, Settings


@dataclass(frozen=True, slots=True)
class Share:
    """What this machine has to do: serve the pipeline, or run one worker of another machine's."""

    settings: Settings
    worker: Role | None = None  # its own model is the target of `settings`
    address: str = ""  # of that worker's coordinator


def share_of(settings: Settings, here: str = "") -> Share:
    """The share of the host `here`; of this one without. Raises ConfigError if there is none.

    The coordinator is where the target is, and the workers where the coordinator is, unless the
    settings say else. Where they name no host everything is here.
    """
    named = settings.hosts
    if not (named.target or named.draft or named.coordinator):
        return Share(settings)
    central = named.coordinator or named.target
    if not central:
        raise ConfigError("say on which host the target is: [hosts] target, or coordinator")
    hosts: dict[Role, str] = {"target": named.target or central, "draft": named.draft or central}
    names = {here.lower()} if here else names_of_this_machine()
    ours: list[Role] = [role for role, host in hosts.items() if is_one_of(host, names)]
    if is_one_of(central, names):
        return Share(_serving(settings, ours))
    if len(ours) != 1:
        all_hosts = ", ".join(sorted({central, *hosts.values()}))
        raise ConfigError(
            f"the coordinator is on {central}, and both workers are here: let it be here, too"
            if ours
            else f"nothing is to run here: the hosts are {all_hosts}; --here says which this is"
        )
    return _working(settings, ours[0], central)


def _serving(settings: Settings, ours: list[Role]) -> Settings:
    """The settings of the coordinator's machine, which starts these workers and awaits others."""

    def place(role: Role) -> Place:
        return "spawn" if role in ours else "remote"

    if len(ours) < 2:
        outer_address(settings)
    return replace(
        settings,
        target=replace(settings.target, place=place("target")),
        draft=replace(settings.draft, place=place("draft")),
    )


def _working(settings: Settings, role: Role, central: str) -> Share:
    listen = outer_address(settings)
    port = listen.rpartition(":")[2]
    if not port.isdecimal() or port == "0":
        raise ConfigError(f"{listen} names no port, by which workers elsewhere could find it")
    shown = f"[{central}]" if ":" in central else central
    address = f"tcp://{shown}:{port}"
    links = settings.links
    if listen in links.insecure:
        links = replace(links, insecure=(*links.insecure, address))
    own = own_settings(role, replace(settings, links=links))
    if role == "draft":
        own = replace(own, target=replace(own.target, hf=settings.draft.hf))
    return Share(own, role, address)


def outer_address(settings: Settings) -> str:
    """The first address of the coordinator that other machines reach. Raises ConfigError."""
    for address in settings.coordinator.listen:
        if address.startswith("tcp://") and not is_local(address):
            return address
    raise ConfigError(
        "a worker is on another machine, but the coordinator listens on its own alone: say "
        '[coordinator] listen = ["tcp://0.0.0.0:5701"]'
    )


def is_one_of(host: str, names: set[str]) -> bool:
    """Whether `host` is one of `names`, in which an address may be spelt otherwise."""
    try:
        return str(ipaddress.ip_address(host)) in names
    except ValueError:
        return host.lower() in names


def names_of_this_machine() -> set[str]:
    """By which a file may call it: its name, long and short, and its addresses."""
    name = socket.gethostname().lower()
    found = {name, name.partition(".")[0], "localhost"}
    for addresses in psutil.net_if_addrs().values():
        found |= {one.address.partition("%")[0] for one in addresses}
    return found
