"""What runs in the processes that a launcher starts: the coordinator and the workers."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import uvloop

from outrider.core.drafter import Drafter
from outrider.core.engine import Engine
from outrider.core.values import Role
from outrider.engines import suffix
from outrider.engines.drafter import ModelDrafter
from outrider.engines.together import BothDrafters
from outrider.errors import ConfigError, InternalError, OutriderError
from outrider.wire.addresses import remove_socket, socket_path
from outrider.wire.keys import Keyring, credentials, needs_keys
from outrider.wire.router import Router
from outrider.wire.trial import check_closed
from outrider_services import options
from outrider_services.models.loading import build_of, load_engine
from outrider_services.pipeline.claim import KILLED, MEASURED, TOKEN
from outrider_services.pipeline.coordinator import Coordinator, Defaults
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.target_worker import TargetWorker
from outrider_services.pipeline.worker import Connection, Measured, serve
from outrider_services.table import Settings

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
M_MMAP_THRESHOLD = -3
RELIEVE_S = 0.1  # between two looks at how heavy the coordinator is
TRIM_EACH = 20  # looks


def coordinator(
    settings: Settings, name: str, own: Mapping[Role, bool], parent_fd: int | None
) -> None:
    """The coordinator process of the pipeline `name`, whose launcher starts the workers `own`.

    Their values say whether others of the role may join, too.
    """
    tokens = dict.fromkeys(own, os.environ.pop(TOKEN, ""))
    serving = _coordinate(
        settings, name, tokens, [role for role, is_open in own.items() if is_open]
    )
    run(serving, parent_fd, lambda: remove_socket(socket_path(name)))


def worker(role: Role, settings: Settings, address: str, parent_fd: int | None) -> None:
    """A worker process. Whatever its role, its own model is the target of `settings`."""
    cores = options.cores(settings.target.cores)
    if cores:
        os.sched_setaffinity(0, cores)
    simulated = settings.pipeline.backend == "toy"
    delay_s = settings.toy.link_ms / 1000 if simulated else 0.0
    token, killed = os.environ.pop(TOKEN, ""), os.environ.pop(KILLED, "") == "1"
    measured = Measured.told(os.environ.pop(MEASURED, ""))
    links, build = settings.links, build_of(settings)
    pipeline, memory = settings.pipeline, settings.pipeline.suffix_memory
    own = credentials(address, role, links.keys or None, insecure=address in links.insecure)
    connection = Connection(address, 10.0, delay_s, token, killed, own, build, measured)

    def load(progress: Callable[[float], None]) -> Engine:
        return load_engine(role, settings, progress)

    def load_drafter(progress: Callable[[float], None]) -> Drafter:
        if settings.target.model == suffix.NAME:
            return suffix.SuffixDrafter(settings.target.ctx, pipeline.parallel, memory)
        drafter = ModelDrafter(load(progress))
        return BothDrafters(drafter, memory) if pipeline.suffix else drafter

    def status(state: str, *details: float | str) -> None:
        if state != "measured" or parent_fd is not None:  # a launcher's, for who follows us
            say(state, *details)

    if role == "target":
        serving = serve(TargetWorker, load, connection, status)
    else:
        serving = serve(DraftWorker, load_drafter, connection, status)
    run(serving, parent_fd, lambda: None)


def say(state: str, *details: float | str) -> None:
    """Tell the launcher our state, in a line of JSON on stdout."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps([state, *details]) + "\n")
        sys.stdout.flush()


async def _coordinate(
    settings: Settings, name: str, tokens: Mapping[Role, str], both: Sequence[Role]
) -> None:
    mode, draft = settings.pipeline.mode, settings.draft
    defaults = Defaults(
        mode,
        draft.n_max,
        draft.n_min,
        draft.p_min,
        allow_grammar=settings.server.allow_grammar,
        tokens=tokens,
        resume_s=settings.coordinator.resume_s,
        both=frozenset(both),
    )

    def hung(role: Role) -> None:
        say("hung", role)

    core = Coordinator(lambda peer, message: router.send(peer, message), defaults, on_hung=hung)
    router = Router(core.on_message, core.on_gone)
    path = socket_path(name)
    try:
        router.bind(f"ipc://{path}")
        await listen(router, settings)
        say("ready", 1.0)
        relieving = asyncio.ensure_future(_relieve(router))
        try:
            await core.run()
        finally:
            relieving.cancel()
    finally:
        await core.close()
        await asyncio.sleep(0.05)  # the last messages need a moment to leave
        router.close()
        remove_socket(path)


async def listen(router: Router, settings: Settings) -> None:
    """Listen at the addresses of the settings. Raises ConfigError rather than leave one open."""
    links, addresses = settings.links, settings.coordinator.listen
    is_keyed = {
        address: needs_keys(address, links.keys, insecure=address in links.insecure)
        for address in addresses
    }
    keys = Keyring(links.keys)
    for address in sorted(addresses, key=lambda one: is_keyed[one]):  # those with keys last
        if is_keyed[address]:
            bound = await _listen_with_keys(router, address, keys)
        else:
            bound = router.bind(address)
        say("listening", bound)
        if address in links.insecure:
            log.warning("%s is open to everybody who can reach it", bound)


async def _listen_with_keys(router: Router, address: str, keys: Keyring) -> str:
    try:
        keys.check_listening()
    except ConfigError as exc:
        raise ConfigError(
            f"{address} would be open to the network: {exc} (or, for everybody to connect and "
            f"read along, say --insecure {address})"
        ) from None
    bound = router.bind(address, keys)
    assert router.doorman
    router.doorman.is_quiet = True
    await check_closed(bound, keys.pair("coordinator").public)
    router.doorman.is_quiet = False
    return bound


async def _relieve(router: Router) -> None:
    """Watch over the memory that peers take, and give back what they leave."""
    library, looks = ctypes.CDLL(None), 0
    is_glibc = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    if is_glibc:  # else it learns to keep what large messages took
        library.mallopt(M_MMAP_THRESHOLD, 128 << 10)
    while True:
        router.relieve()
        looks += 1
        if is_glibc and looks % TRIM_EACH == 0:
            library.malloc_trim(0)
        await asyncio.sleep(RELIEVE_S)


def run(
    main: Coroutine[Any, Any, None], parent_fd: int | None, clean_up: Callable[[], None]
) -> None:
    """Run `main` until it is done, a signal comes, or the launcher is gone.

    The launcher is gone when `parent_fd` becomes readable; then only `clean_up` runs. Without a
    launcher an OutriderError is raised, else it is reported and the process exits with its status.
    """

    async def wrapped() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)

        def end() -> None:
            if not task.cancelling():  # a second signal must not interrupt the cleaning up
                task.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        if parent_fd is not None:

            def orphaned() -> None:
                clean_up()
                os._exit(InternalError.exit_code)

            loop.add_reader(parent_fd, orphaned)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    if parent_fd is not None:
        # in case the loop hangs and does not see the pipe, the kernel ends us, too
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        uvloop.run(wrapped())
    except OutriderError as exc:
        if parent_fd is None:
            raise
        say("error", exc.code, str(exc))  # the launcher tells the user
        sys.exit(exc.exit_code)
