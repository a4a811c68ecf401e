"""Whatever dies, hangs, lies or talks nonsense: the text stays the same, or there is one error."""

from __future__ import annotations

import asyncio
import os
import random
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import psutil
import pytest
import zmq

import outrider
from outrider.client import AsyncClient, Completion, Stream, connect
from outrider.core.events import Commit, OpenDraft, Prefill
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, Proposal, Verdict, Verify
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyEngine
from outrider.engines.toy_text import SMALLEST
from outrider.errors import ConnectionFailed, IncompatiblePair, Overloaded, WorkerLost
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider.wire.transport import Link, PeerGone
from outrider_services.pipeline import launcher as launchers
from outrider_services.pipeline import worker as workers
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.launcher import Launcher
from outrider_services.pipeline.roster import LOST_S

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle, Pipeline, Serve, Served

    Pipelines = Callable[..., AbstractAsyncContextManager[Pipeline]]

PROMPT = "The river runs"
SEEN_S = 1.5  # a connection that ends is seen at once: milliseconds, and what a busy machine adds
SLOW = {"toy__step_ms": 10.0, "toy__draft_ms": 1.0}


async def begin(client: AsyncClient, count: int, **settings: Any) -> Stream:
    """A greedy request that has committed a few tokens."""
    settings = {"temperature": 0.0, "mode": "pipelined", **settings}
    stream: Stream = await client.create_completion(
        PROMPT, max_tokens=count, stream=True, **settings
    )
    while len(ids(stream)) < 12:
        await anext(stream)
    return stream


async def complete(
    client: AsyncClient, count: int, prompt: str = PROMPT, **more: Any
) -> Completion:
    settings = {"temperature": 0.0, "mode": "pipelined", **more}
    done: Completion = await client.create_completion(prompt, max_tokens=count, **settings)
    return done


def ids(answer: Stream | Completion) -> list[int]:
    if isinstance(answer, Completion):
        return [token.id for token in answer.tokens]
    return [token.id for fragment in answer.fragments for token in fragment.tokens]


# ---- a draft worker that dies or hangs ----------------------------------------------------------


async def test_a_draft_that_is_killed_changes_no_token_and_rides_again(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        stream = await begin(client, 400)
        killed = up.pids()["draft"]
        os.kill(killed, signal.SIGKILL)
        await stream.result()
        assert ids(stream) == oracle(PROMPT, 400).token_ids
        # it came back within the same request, and drafted for it
        fragments = [bool(fragment.drafted) for fragment in stream.fragments]
        assert True in fragments[-10:]
        assert up.pids()["draft"] != killed
        after = await complete(client, 40)
        assert ids(after) == oracle(PROMPT, 40).token_ids
        assert after.stats.accepted_tokens > 0
        assert any("starting it again" in line for line in up.lines)


def test_a_command_whose_draft_is_killed_says_the_same_and_succeeds(
    cli: Cli, oracle: Oracle
) -> None:
    flags = ("--backend=toy", "--mode=pipelined", "--temperature=0", "-n", "200")
    running = cli.start("run", *flags, PROMPT)
    begun = until_text(running)
    draft = child(running, "draft")
    assert draft is not None
    draft.kill()
    rest, err = running.communicate(timeout=20)
    assert running.returncode == 0, err
    assert begun + rest == oracle(PROMPT, 200).text + "\n"
    assert "the draft process ended by itself" in err


def until_text(process: subprocess.Popen[str]) -> str:
    """The first that it writes: whole characters, for it writes no others."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 15.0)[0]
    return os.read(process.stdout.fileno(), 4096).decode()


def child(process: subprocess.Popen[str], role: str) -> psutil.Process | None:
    with suppress(psutil.Error):
        for one in psutil.Process(process.pid).children():
            with suppress(psutil.Error):
                if role in one.cmdline():
                    return one
    return None


@pytest.mark.parametrize(("pause_s", "count"), [(0.3, 120), (2.0, 400)])
async def test_a_draft_that_is_stopped_for_a_while_changes_no_token(
    pipeline: Pipelines, oracle: Oracle, pause_s: float, count: int
) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        stream = await begin(client, count)
        pid = up.pids()["draft"]
        os.kill(pid, signal.SIGSTOP)
        try:
            resume = asyncio.get_running_loop().call_later(pause_s, os.kill, pid, signal.SIGCONT)
            await stream.result()
        finally:
            resume.cancel()
            os.kill(pid, signal.SIGCONT)
        assert ids(stream) == oracle(PROMPT, count).token_ids
        await up.joined(client, "draft")
        assert up.pids()["draft"] == pid
        after = await complete(client, 40)
        assert ids(after) == oracle(PROMPT, 40).token_ids
        assert after.stats.accepted_tokens > 0


async def test_a_draft_that_stays_stopped_costs_little_time(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    """Not more than plain mode takes and, once, the patience with a late draft."""
    async with pipeline(**SLOW) as up, up.connect() as client:
        for mode in ("sync", "pipelined"):
            stream = await begin(client, 80, mode=mode)
            pid = up.pids()["draft"]
            os.kill(pid, signal.SIGSTOP)
            try:
                began = time.monotonic()
                await stream.result()
                took_s = time.monotonic() - began
            finally:
                os.kill(pid, signal.SIGCONT)
            assert ids(stream) == oracle(PROMPT, 80).token_ids
            assert took_s < 68 * 0.0125 + 1.0
            await up.joined(client, "draft")


# ---- a target worker that dies or hangs ---------------------------------------------------------


async def test_a_target_that_is_killed_is_a_pause(pipeline: Pipelines, oracle: Oracle) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        measured = (await client.health())["costs"]["target"]
        stream = await begin(client, 400)
        killed = up.pids()["target"]
        os.kill(killed, signal.SIGKILL)
        await stream.result()
        assert ids(stream) == oracle(PROMPT, 400).token_ids
        assert up.pids()["target"] != killed
        # to the last bit: nobody who waited for it waited for measurements, too
        assert (await client.health())["costs"]["target"] == measured
        after = await complete(client, 40)
        assert ids(after) == oracle(PROMPT, 40).token_ids
        assert after.stats.accepted_tokens > 0


async def test_a_target_that_hangs_is_ended_and_all_that_was_asked_goes_on(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        stream = await begin(client, 400)
        pid = up.pids()["target"]
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        asked = asyncio.ensure_future(client.detokenize([65, 66]))
        submitted = asyncio.ensure_future(complete(client, 5))
        assert await asked == "AB"
        assert LOST_S < time.monotonic() - began < LOST_S + 5.0
        assert ids(await submitted) == oracle(PROMPT, 5).token_ids
        await stream.result()
        assert ids(stream) == oracle(PROMPT, 400).token_ids
        assert up.pids()["target"] != pid
        assert any("did not answer and was ended" in line for line in up.lines)


async def test_a_target_that_does_not_come_back_is_one_error_for_each(
    pipeline: Pipelines, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"pipeline__parallel": 1, "coordinator__resume_s": 0.5}
    async with pipeline(**SLOW, **limits) as up, up.connect() as client:
        monkeypatch.setattr(launchers, "RESTARTS", (0, 60.0))
        running = await begin(client, 400)
        waiting = asyncio.ensure_future(complete(client, 5))
        await up.until("a request waits", lambda: waits(client))
        began = time.monotonic()
        os.kill(up.pids()["target"], signal.SIGKILL)
        for answer in (running.result(), waiting):
            with pytest.raises(WorkerLost, match=r"and no other came within 0\.5 s"):
                await answer
        assert 0.5 < time.monotonic() - began < 0.5 + 2 * SEEN_S
        assert ids(running) == oracle(PROMPT, 400).token_ids[: len(ids(running))]
        with pytest.raises(WorkerLost, match="no target worker is connected"):
            await complete(client, 5)


async def waits(client: AsyncClient) -> bool:
    return bool((await client.health())["requests"]["waiting"])


def test_a_command_whose_target_is_killed_says_the_same_and_succeeds(
    cli: Cli, oracle: Oracle
) -> None:
    running = cli.start("run", "--backend=toy", "--temperature=0", "-n", "200", PROMPT)
    begun = until_text(running)
    target = child(running, "target")
    assert target is not None
    target.kill()
    rest, err = running.communicate(timeout=20)
    assert running.returncode == 0, err
    assert begun + rest == oracle(PROMPT, 200).text + "\n"
    assert "the target process ended by itself" in err
    assert "Traceback" not in err


# ---- the coordinator or the launcher dies -------------------------------------------------------


async def test_a_coordinator_that_is_killed_is_a_pause(pipeline: Pipelines, oracle: Oracle) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        workers = up.pids()
        stream = await begin(client, 400)
        os.kill(workers["coordinator"], signal.SIGKILL)
        await stream.result()
        assert ids(stream) == oracle(PROMPT, 400).token_ids
        assert "".join(one.text for one in stream.fragments) == oracle(PROMPT, 400).text
        now = up.pids()
        assert now.pop("coordinator") != workers.pop("coordinator")
        assert now == workers  # they found it again
        after = await complete(client, 40)
        assert ids(after) == oracle(PROMPT, 40).token_ids
        assert after.stats.accepted_tokens > 0


async def test_a_coordinator_that_does_not_come_back_is_one_error_for_each(
    pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "RESTARTS", (0, 60.0))
    async with pipeline(**SLOW) as up, connect(up.name, resume_s=1.0) as client:
        stream = await begin(client, 400)
        began = time.monotonic()
        os.kill(up.pids()["coordinator"], signal.SIGKILL)
        with pytest.raises(WorkerLost, match="coordinator"):
            async with asyncio.timeout(1.0):
                await asyncio.shield(up.launcher.failed)
        with pytest.raises(ConnectionFailed, match="was lost before the answer ended"):
            await stream.result()
        assert time.monotonic() - began < 1.0 + 2 * SEEN_S
        with pytest.raises(ConnectionFailed, match="is gone"):
            await complete(client, 5)  # now it is known


def test_a_pipeline_whose_coordinator_is_killed_stays_where_it_is(
    cli: Cli, serve: Serve, oracle: Oracle
) -> None:
    served = serve("headless")
    with outrider.Client(served.tcp) as client:  # at a port that the system has chosen
        stream = client.create_completion(PROMPT, max_tokens=200, temperature=0, stream=True)
        next(stream)
        os.kill(served.pids()["coordinator"], signal.SIGKILL)
        assert stream.result().text == oracle(PROMPT, 200).text
        assert client.detokenize([65]) == "A"
    assert cli("run", "--connect=headless", "-n", "5", PROMPT).returncode == 0
    assert served.stop() == 143


def test_nothing_is_left_three_seconds_after_the_launcher_is_killed(
    cli: Cli, serve: Serve, look_for_leaks: Callable[..., list[str]]
) -> None:
    served = serve("doomed")
    running = cli.start("run", "--backend=toy", "-n", "1000", PROMPT)
    until_text(running)
    for launcher in (served.process, running):
        launcher.kill()
    for launcher in (served.process, running):
        launcher.communicate()
        assert launcher.returncode == -signal.SIGKILL
    assert look_for_leaks() == []  # which gives them those three seconds


def test_nothing_is_left_of_a_launcher_killed_while_it_starts(
    cli: Cli, look_for_leaks: Callable[..., list[str]]
) -> None:
    started = [cli.start("serve", "--backend=toy", f"--name=early{n}") for n in range(4)]
    for process, delay_s in zip(started, (0.3, 0.1, 0.1, 0.1), strict=True):
        time.sleep(delay_s)
        process.kill()
    for process in started:
        process.communicate()
    assert look_for_leaks() == []


def test_a_second_signal_does_not_cut_cleaning_up_short(cli: Cli) -> None:
    """The kernel itself sends one for each thread of a launcher that was killed."""
    coordinator = cli.start("coordinator", "--name=twice")
    assert "ready" in until_text(coordinator)
    for _ in range(10):
        coordinator.terminate()
        time.sleep(0.002)
    coordinator.communicate(timeout=10)
    assert coordinator.returncode == 0
    assert list(cli.runtime.glob("outrider/*.sock")) == []


def until_up(process: subprocess.Popen[str]) -> None:
    assert process.stderr
    while not process.stderr.readline().startswith("Ready:"):
        assert process.poll() is None


def test_of_two_that_start_under_one_name_one_is_up_and_the_other_says_why(cli: Cli) -> None:
    for name in ("twin-1", "twin-2", "twin-3"):
        flags = ("serve", f"--name={name}", "--backend=toy", "--listen=tcp://127.0.0.1:0")
        twins = [cli.start(*flags) for _ in range(2)]
        while all(twin.poll() is None for twin in twins):
            time.sleep(0.02)
        loser = next(twin for twin in twins if twin.poll() is not None)
        (winner,) = (twin for twin in twins if twin is not loser)
        _, err = loser.communicate(timeout=10)
        assert loser.returncode == 3, err
        assert f"a pipeline named '{name}' is running" in err
        until_up(winner)
        done = cli("run", f"--connect={name}", "-n", "5", "-o", "json", PROMPT)
        assert done.returncode == 0, done.stderr
        winner.terminate()
        winner.communicate(timeout=10)
        assert winner.returncode == 143
    assert list(cli.runtime.glob("outrider/*")) == []


def test_a_name_is_free_as_soon_as_its_killed_launcher_has_left_nothing(cli: Cli) -> None:
    flags = ("serve", "--name=again", "--backend=toy", "--listen=tcp://127.0.0.1:0")
    for _ in range(3):
        process = cli.start(*flags)
        until_up(process)
        process.kill()
        process.communicate(timeout=10)
    last = cli.start(*flags)
    until_up(last)
    assert cli("run", "--connect=again", "-n", "5", "-o", "json", PROMPT).returncode == 0
    last.terminate()
    last.communicate(timeout=10)


def test_a_socket_left_over_does_not_keep_the_name(serve: Serve) -> None:
    served = serve("phoenix")
    os.kill(served.pids()["coordinator"], signal.SIGSTOP)  # so that it cannot clean up
    served.process.kill()
    served.process.communicate()
    for pid in served.pids().values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    (path,) = served.runtime.glob("outrider/*.sock")
    again = serve("phoenix")
    assert again.stop() == 143
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_serve_with_its_status(serve: Serve, number: signal.Signals) -> None:
    served = serve("signalled")
    served.process.send_signal(number)
    _, err = served.process.communicate(timeout=10)
    assert served.process.returncode == 128 + number
    assert "Traceback" not in err


@pytest.mark.parametrize("delay_s", [0.25, 0.6, None])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_run_with_its_status(
    cli: Cli, number: signal.Signals, delay_s: float | None
) -> None:
    running = cli.start("run", "--backend=toy", "-n", "1000", PROMPT)
    if delay_s is None:
        until_text(running)
    else:
        time.sleep(delay_s)  # while it imports, while the pipeline starts
    running.send_signal(number)
    _, err = running.communicate(timeout=10)
    assert running.returncode in (128 + number, -number)
    if delay_s is None:
        assert running.returncode == 128 + number
        assert "Traceback" not in err


LOST = """
import signal, sys
class Loses:
    def find_spec(self, name, path=None, target=None):
        if name == "outrider_services.commands.cli":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:  # as in a callback, where Python prints it and goes on
                pass
sys.meta_path.insert(0, Loses())
sys.argv = ["outrider", "--version"]
signal.signal(signal.SIGINT, signal.{handler})
from outrider_services.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("handler", "status"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", 0)]
)
def test_no_interrupt_is_lost_while_it_imports(handler: str, status: int) -> None:
    code = LOST.format(handler=handler)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    assert done.returncode == status, done.stderr


def test_the_first_interrupt_shows_what_there_is(cli: Cli, oracle: Oracle) -> None:
    flags = ("--backend=toy", "--temperature=0", "-n", "1500")
    running = cli.start("run", *flags, PROMPT)
    begun = until_text(running)
    running.send_signal(signal.SIGINT)
    rest, err = running.communicate(timeout=10)
    assert running.returncode == 130
    shown = (begun + rest).removesuffix("\n")
    assert shown
    counted = re.search(r"Total tokens generated: (\d+) ", err)
    assert counted, err
    assert shown == oracle(PROMPT, int(counted[1])).text
    assert int(counted[1]) < 1500


def test_interrupts_from_a_terminal_reach_only_the_launcher(cli: Cli) -> None:
    """Ctrl-C goes to the whole foreground group: the workers must not be in it."""
    running = cli.start("run", "--backend=toy", "-n", "1000", PROMPT)
    while not (draft := child(running, "draft")):
        assert running.poll() is None
    assert os.getpgid(draft.pid) != os.getpgid(running.pid)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=10)


# ---- several at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [2, 8])
async def test_clients_at_once_get_what_they_would_get_alone(
    pipeline: Pipelines, oracle: Oracle, clients: int
) -> None:
    async def ask(n: int) -> tuple[list[int], list[int]]:
        settings = {"temperature": 0.8, "seed": n} if n % 2 else {"temperature": 0.0}
        mode = ("pipelined", "sync", "plain")[n % 3]
        prompt = f"{PROMPT} {n}"
        async with up.connect() as client:
            done = await complete(client, 60 + n, prompt, mode=mode, **settings)
        return ids(done), oracle(prompt, 60 + n, **settings).token_ids

    async with pipeline(pipeline__parallel=4) as up:
        for said, expected in await asyncio.gather(*map(ask, range(clients))):
            assert said == expected


async def test_a_request_that_is_cancelled_frees_its_sequences(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with pipeline(pipeline__parallel=1) as up, up.connect() as client:
        for _ in range(5):
            stream = await begin(client, 1000)
            await stream.cancel()
            result = await stream.result()
            assert result.choices[0].finish_reason == "cancelled"
            assert ids(result) == oracle(PROMPT, 1000).token_ids[: len(ids(result))]
        after = await complete(client, 40)
        assert ids(after) == oracle(PROMPT, 40).token_ids
        assert after.stats.accepted_tokens > 0  # the draft worker's sequence is free too


async def test_a_client_that_vanishes_frees_its_sequences(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with pipeline(pipeline__parallel=1) as up, up.connect() as client:
        for _ in range(3):
            async with up.connect() as other:
                await begin(other, 1000)  # and not a word more: the connection just ends
            await up.idle(client, within_s=SEEN_S)
        after = await complete(client, 40)
        assert ids(after) == oracle(PROMPT, 40).token_ids
        assert after.stats.accepted_tokens > 0


async def test_a_client_that_is_killed_frees_its_sequences(pipeline: Pipelines) -> None:
    program = (
        "import outrider\n"
        "with outrider.Client('test') as client:\n"
        "    for _ in client.create_completion('x', max_tokens=2000, stream=True):\n"
        "        print(flush=True)"
    )
    async with pipeline(**SLOW, pipeline__parallel=1) as up, up.connect() as client:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        await process.stdout.readline()
        process.kill()
        await process.communicate()
        await up.idle(client, within_s=SEEN_S)
        assert (await complete(client, 40)).stats.accepted_tokens > 0


async def test_more_requests_than_may_wait_are_refused_at_once(pipeline: Pipelines) -> None:
    async with pipeline(toy__step_ms=50.0, pipeline__parallel=2) as up:
        async with up.connect() as client:
            began = time.monotonic()
            tasks = [asyncio.ensure_future(complete(client, 1000)) for _ in range(80)]
            done, waiting = await asyncio.wait(tasks, timeout=1.0)
            refused = [task.exception() for task in done]
            assert len(refused) == 80 - 64
            assert all(isinstance(error, Overloaded) for error in refused)
            assert time.monotonic() - began < 1.5
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        async with up.connect() as client:
            await up.idle(client)
            assert len(ids(await complete(client, 5))) == 5


# ---- nonsense on the wire -----------------------------------------------------------------------

SAMPLING = Sampling(temperature=0.0)


def nonsense(seed: int) -> Iterator[list[bytes]]:
    """Messages that nobody may send, or that nobody should understand."""
    chance = random.Random(seed)
    yield [b""]
    yield [b"a", b"b", b"c"]
    yield [encode(wire.Ping()), b"more"]
    yield [b"\x91" * 2000]
    yield [b"\xc1"]
    yield [msgpack.packb(["hello"])]
    yield [msgpack.packb(["verify", -1, 2**64 - 1, "x", None])]
    yield [msgpack.packb({"type": "submit"})]
    yield [msgpack.packb([["submit"], 1])]
    yield [msgpack.packb(["beat", 1, True, "extra"])]
    yield [b"\xdd\xff\xff\xff\xff"]
    yield [bytes(2 << 20)]
    whole = encode(wire.Tokenize(1, "text", True))
    for _ in range(40):
        yield [chance.randbytes(chance.randrange(1, 200))]
        cut = chance.randrange(len(whole))
        yield [whole[:cut] + bytes([chance.randrange(256)]) + whole[cut + 1 :]]


def impostures() -> Iterator[wire.Message]:
    """Well-formed messages that only workers, or only the coordinator, may send."""
    for number in range(1, 60):  # answers to questions that are open somewhere
        yield wire.Tokens(number, (0, 1, 2))
        yield wire.Rendered(number, "no")
        yield wire.LabelTexts(number, ("no",))
        yield wire.Failed(number, "internal_error", "no")
    for round_ in range(5):
        yield wire.Done(1, Verdict(0, (65,), round_, 14 + round_, (b"A",), (1.0,)))
        yield wire.Done(1, Proposal(round_, 14, (Drafted(65, 0.5),), 0.0))
        yield wire.Do(1, Verify(round_, 14, (1, 2)))
    yield wire.Do(1, Prefill((1, 2), SAMPLING, False))
    yield wire.Do(1, Commit(14, (1,), 20))
    yield wire.Do(1, OpenDraft(1, 14, (1,), SAMPLING, SMALLEST, (256,), 20))
    yield wire.Close(1)
    yield wire.Welcome()
    yield wire.Refused("invalid_config", "go away")
    yield wire.Who()
    yield wire.Beat(1, True)
    for call in range(1, 20):
        yield wire.Cancel(call)


@asynccontextmanager
async def dealer(address: str) -> AsyncIterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    try:
        socket.connect(address)
        await asyncio.sleep(0.05)
        yield socket
    finally:
        socket.close(linger=0)
        context.term()


async def test_nonsense_on_the_wire_disturbs_nobody(pipeline: Pipelines, oracle: Oracle) -> None:
    async with pipeline(toy__step_ms=10.0) as up, up.connect() as client:
        address = f"ipc://{up.runtime}/outrider/test.sock"
        stream = await begin(client, 700)
        for seed in range(14):  # after a few bad frames a connection is not listened to any more
            async with dealer(address) as one:
                for frames in [*nonsense(seed)][6 * seed :]:
                    with suppress(zmq.Again):
                        one.send_multipart(frames, zmq.NOBLOCK)
                await asyncio.sleep(0.01)
        asked = [asyncio.ensure_future(client.tokenize(f"text {n}")) for n in range(40)]
        async with dealer(address) as one:
            for message in impostures():
                one.send(encode(message))
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
        for n, tokens in enumerate(await asyncio.gather(*asked)):
            assert bytes(tokens) == f"text {n}".encode()
        assert stream.finish_reason is None  # it was running all the time
        await stream.result()
        assert ids(stream) == oracle(PROMPT, 700).token_ids
        health = await client.health()
        assert (health["status"], set(health["workers"])) == ("ok", {"target", "draft"})


async def test_a_peer_that_sends_only_nonsense_is_no_longer_listened_to(
    pipeline: Pipelines,
) -> None:
    async with pipeline() as up, dealer(f"ipc://{up.runtime}/outrider/test.sock") as one:
        one.send(encode(wire.Health(1)))
        assert await asyncio.to_thread(one.poll, 1000)
        one.recv()
        for _ in range(20):
            one.send(b"nonsense")
        one.send(encode(wire.Health(2)))
        await asyncio.sleep(0.2)
        while await asyncio.to_thread(one.poll, 100):
            assert isinstance(decode(one.recv()), wire.Ping)
        async with up.connect() as client:
            assert (await client.health())["status"] == "ok"


# ---- a draft worker that lies -------------------------------------------------------------------

Answers = list[wire.Message]


class Byzantine:
    """Joins as a draft worker, keeps the connection up, and answers each message as it likes."""

    def __init__(self, behave: Callable[[Byzantine, wire.Message], Answers], **hello: Any) -> None:
        self.behave, self.sent, self.asked = behave, 0, 0
        self.chance = random.Random(11)
        self.length = 0  # the text that it knows of
        self.request = 0  # none is open
        self.lineage = 0
        self.joined = asyncio.get_running_loop().create_future()
        info = ToyEngine().info
        said: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "version": outrider.__version__,
            "role": "draft",
            "incarnation": self.chance.getrandbits(60),
            "model": "byzantine",
            "vocabulary": info.vocabulary,
            "context": info.context,
            "slots": info.slots,
            "device": "toy",
            "cores": "",
            "curve_s": (0.001,),
        }
        self.hello = wire.Hello(**{**said, **hello})

    @asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator[Byzantine]:
        self.link = Link(address, self.on_message)
        beats = asyncio.ensure_future(self.beat())
        try:
            while not self.joined.done():
                self.say(self.hello)
                await asyncio.wait([self.joined], timeout=0.05)
            yield self
        finally:
            beats.cancel()
            self.link.close()

    def say(self, message: wire.Message) -> None:
        with suppress(PeerGone):
            self.link.send(message)

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            self.say(wire.Beat(self.asked, False))

    def on_message(self, message: wire.Message) -> None:
        match message:
            case wire.Welcome() | wire.Refused():
                if not self.joined.done():
                    self.joined.set_result(message)
                return
            case wire.Who():
                self.say(self.hello)
                return
            case wire.Do(request, OpenDraft(lineage, _, tokens)):
                self.request, self.lineage, self.length = request, lineage, len(tokens)
            case wire.Do(_, Commit(base, tokens)):
                self.length = base + len(tokens)
            case _:
                return
        self.asked += 1
        for answer in self.behave(self, message):
            self.sent += 1
            self.say(answer)

    def drafted(
        self, tokens: tuple[int, ...], *, lineage: int | None = None, position: int | None = None
    ) -> wire.Done:
        assert self.request
        proposal = Proposal(
            lineage=self.lineage if lineage is None else lineage,
            position=self.length if position is None else position,
            drafted=tuple(Drafted(token, 0.9) for token in tokens),
            elapsed_s=0.0001,
        )
        return wire.Done(self.request, proposal)


def out_of_range(worker: Byzantine, _: wire.Message) -> Answers:
    return [worker.drafted((SMALLEST,)), worker.drafted((2**31 - 1,))]


def too_many(worker: Byzantine, _: wire.Message) -> Answers:
    return [worker.drafted((101,) * 1000)]


def wrong_positions(worker: Byzantine, _: wire.Message) -> Answers:
    places = (0, worker.length - 1, worker.length + 1, 2000, 2**31 - 1)
    return [worker.drafted((101,), position=place) for place in places]


def stale_lineages(worker: Byzantine, _: wire.Message) -> Answers:
    worker.lineage += 1
    return [worker.drafted((101,), lineage=n) for n in (0, 1, worker.lineage - 1)]


def lineages_to_come(worker: Byzantine, _: wire.Message) -> Answers:
    return [worker.drafted((101,), lineage=n) for n in (worker.lineage + 1, 2**31 - 1)]


def nothing_at_all(worker: Byzantine, _: wire.Message) -> Answers:
    return []


def empty_drafts(worker: Byzantine, _: wire.Message) -> Answers:
    return [worker.drafted(())] * 3


def pauses(worker: Byzantine, _: wire.Message) -> Answers:
    """It has no idea, again and again."""
    done = worker.drafted(()).done
    assert isinstance(done, Proposal)
    return [wire.Done(worker.request, done.changed(paused=True))] * 3


def wrong_tokens(worker: Byzantine, _: wire.Message) -> Answers:
    """Perfectly formed, as an honest but hopeless draft would send them."""
    return [worker.drafted((worker.chance.randrange(256),)) for _ in range(1)]


def end_tokens(worker: Byzantine, _: wire.Message) -> Answers:
    return [worker.drafted((256,))]


def other_requests(worker: Byzantine, _: wire.Message) -> Answers:
    numbers = (0, worker.request + 1, 2**63 - 1)
    return [worker.drafted((101,)).changed(request=number) for number in numbers]


def failures(worker: Byzantine, _: wire.Message) -> Answers:
    return [wire.Failed(worker.request, "internal_error", "no")]


def verdicts(worker: Byzantine, _: wire.Message) -> Answers:
    """What only a target may say."""
    at = worker.length
    verdicts = [Verdict(0, (101,), n, at, (b"e",), (1.0,)) for n in range(3)]
    return [wire.Done(worker.request, verdict) for verdict in verdicts]


def endless_times(worker: Byzantine, _: wire.Message) -> Answers:
    proposal = Proposal(1, worker.length, (Drafted(101, 1.0),), 1e6)
    return [wire.Done(worker.request, proposal)]


def anything(worker: Byzantine, _: wire.Message) -> Answers:
    pick = worker.chance.choice
    return [
        worker.drafted(
            tuple(worker.chance.randrange(300) for _ in range(pick((0, 1, 2, 9, 40)))),
            lineage=worker.lineage + pick((-1, 0, 0, 0, 1)) if worker.lineage else None,
            position=max(0, worker.length + pick((-9, -1, 0, 0, 0, 1, 9))),
        )
        for _ in range(8)
    ]


@pytest.fixture(scope="module")
def without_draft(module_cli: Cli, served: Served) -> Iterator[Served]:
    """A pipeline that waits for a draft worker from elsewhere."""
    flags = ("--draft-place=remote", "--toy-step-ms=2", "--toy-row-ms=0.02")
    open_to_drafts = type(served)(module_cli, "remote", *flags)
    yield open_to_drafts
    assert open_to_drafts.stop() == 143


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
@pytest.mark.parametrize(
    "behave",
    [
        out_of_range,
        too_many,
        wrong_positions,
        stale_lineages,
        lineages_to_come,
        nothing_at_all,
        empty_drafts,
        pauses,
        wrong_tokens,
        end_tokens,
        other_requests,
        failures,
        verdicts,
        endless_times,
        anything,
    ],
    ids=lambda behave: behave.__name__.replace("_", "-"),
)
async def test_a_draft_that_lies_changes_no_token(
    without_draft: Served, oracle: Oracle, behave: Any, mode: str
) -> None:
    async with without_draft.connect() as client:
        async with Byzantine(behave).connected(without_draft.ipc) as worker:
            assert isinstance(worker.joined.result(), wire.Welcome)
            began = time.monotonic()
            done = await complete(client, 30, mode=mode)
            assert ids(done) == oracle(PROMPT, 30).token_ids
            assert done.choices[0].finish_reason == "length"
            # as long as without a draft, and once the patience that a late one is given
            assert time.monotonic() - began < 2.0
            assert worker.asked > 0
            assert worker.sent > 0 or behave is nothing_at_all
            stats = done.stats
            made = stats.verified_tokens + stats.discarded_tokens + stats.hits
            assert stats.drafted_tokens == made
        left = time.monotonic()
        while "draft" in (health := await client.health())["workers"]:
            assert time.monotonic() - left < SEEN_S
            await asyncio.sleep(0.01)
        assert health["status"] == "ok"
        assert health["requests"] == {"running": 0, "waiting": 0}


TAKEN = """print('["error", "busy", "there is a draft worker already"]')"""


# ---- workers that do not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hello", "code", "reason"),
    [
        (
            {"protocol": wire.PROTOCOL + 1, "version": "9.9"},
            "protocol_error",
            f"the draft worker speaks protocol {wire.PROTOCOL + 1} (outrider 9.9), the "
            f"coordinator {wire.PROTOCOL} (outrider {outrider.__version__})",
        ),
        (
            {"role": "target"},
            "invalid_config",
            "this pipeline starts its target worker itself; to let others join, start it with "
            "--target-place both",
        ),
    ],
    ids=["another-protocol", "a-second-target"],
)
async def test_a_worker_that_cannot_serve_is_told_why(
    without_draft: Served, hello: dict[str, Any], code: str, reason: str
) -> None:
    began = time.monotonic()
    async with Byzantine(nothing_at_all, **hello).connected(without_draft.ipc) as worker:
        assert worker.joined.result() == wire.Refused(code, reason)
    assert time.monotonic() - began < 1.0


async def test_a_hello_of_another_protocol_may_have_other_fields(without_draft: Served) -> None:
    """The reason must reach exactly those workers whose messages look different."""
    hello = ["hello", wire.PROTOCOL + 1, "9.9", "draft", 1, {"something": "else"}]
    async with dealer(without_draft.ipc) as one:
        one.send(msgpack.packb(hello))
        assert await asyncio.to_thread(one.poll, 1000), "no answer"
        answer = decode(one.recv())
        assert isinstance(answer, wire.Refused)
        assert f"protocol {wire.PROTOCOL + 1}" in answer.reason


async def test_a_worker_without_a_coordinator_says_so(runtime: Path) -> None:
    nobody = f"ipc://{runtime}/nobody.sock"
    states: list[str] = []
    with pytest.raises(ConnectionFailed, match=f"no coordinator answers at {nobody}"):
        await workers.serve(
            DraftWorker,
            lambda progress: ModelDrafter(ToyEngine()),
            workers.Connection(nobody, timeout_s=0.3),
            lambda state, *_: states.append(state),
        )
    assert "ready" not in states


async def test_a_pair_that_does_not_fit_does_not_start(pipeline: Pipelines) -> None:
    def edit(launcher: Launcher) -> None:
        for one in launcher._children:
            if one.role == "draft":
                one.arguments.append("--toy-variant=3")

    last = r"is '<\|file_sep\|>' in the target, '<\|variant_3\|>' in the draft"
    told = f"token {SMALLEST - 1} {last}"
    with pytest.raises(IncompatiblePair, match=told):
        async with pipeline(edit=edit):
            pass


async def test_a_second_draft_is_refused_and_the_first_rides_on(
    served: Served, oracle: Oracle
) -> None:
    async with (
        served.connect() as client,
        Byzantine(wrong_tokens).connected(served.ipc) as worker,
    ):
        refused = worker.joined.result()
        assert isinstance(refused, wire.Refused)
        assert "starts its draft worker itself" in refused.reason
        done = await complete(client, 40)
        assert ids(done) == oracle(PROMPT, 40).token_ids
        assert done.stats.accepted_tokens > 0


async def test_a_second_draft_from_elsewhere_stands_by(
    without_draft: Served, oracle: Oracle
) -> None:
    async with (
        without_draft.connect() as client,
        Byzantine(wrong_tokens).connected(without_draft.ipc) as first,
        Byzantine(wrong_tokens, incarnation=5, curve_s=(1.0,)).connected(
            without_draft.ipc
        ) as second,
    ):
        assert isinstance(first.joined.result(), wire.Welcome)
        assert isinstance(second.joined.result(), wire.Welcome)
        done = await complete(client, 40)
        assert ids(done) == oracle(PROMPT, 40).token_ids
        assert (first.asked > 0, second.asked) == (True, 0)


@pytest.mark.parametrize("role", ["draft", "target"])
async def test_nobody_takes_the_place_of_a_worker_that_died(
    pipeline: Pipelines, oracle: Oracle, role: str
) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        address = f"ipc://{up.runtime}/outrider/{up.name}.sock"
        told = " ".join(arg for pid in up.pids().values() for arg in psutil.Process(pid).cmdline())
        assert up.launcher._token not in told
        for number in range(2):
            dead = up.pids()[role]
            os.kill(dead, signal.SIGKILL)
            stranger = Byzantine(wrong_tokens, role=role, incarnation=number)
            async with stranger.connected(address):
                assert isinstance(stranger.joined.result(), wire.Refused)
                await up.joined(client, role)
                health = await client.health()
                assert health["workers"][role]["model"] != "byzantine"
                assert health["refused"] == {}
                done = await complete(client, 40)
                assert ids(done) == oracle(PROMPT, 40).token_ids
                assert done.stats.accepted_tokens > 0 or role == "target"
                assert up.pids()[role] != dead
            assert stranger.asked == 0
        assert not [line for line in up.lines if "stays down" in line]


async def test_a_worker_whose_place_is_taken_is_started_until_it_is_free(
    pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than a worker that crashes would be."""
    monkeypatch.setattr(launchers, "BACKOFF_S", (0.01, 0.02))
    monkeypatch.setattr(launchers, "RESTARTS", (1, 60.0))
    async with pipeline(**SLOW) as up, up.connect() as client:
        (draft,) = (child for child in up.launcher._children if child.role == "draft")
        real, draft.arguments = draft.arguments, ["-c", TAKEN]
        start = asyncio.create_subprocess_exec

        def instead(program: str, *arguments: str, **more: Any) -> Any:
            if "-c" in arguments:  # it only says what a worker says whose place is taken
                return start(program, "-c", TAKEN, **more)
            return start(program, *arguments, **more)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", instead)
        os.kill(up.pids()["draft"], signal.SIGKILL)

        def tries() -> int:
            return sum("already; starting it again" in line for line in up.lines)

        await up.until("five tries", lambda: tries() >= 5)
        draft.arguments = real
        await up.joined(client, "draft")
        assert not [line for line in up.lines if "stays down" in line]


# ---- the leak check itself ----------------------------------------------------------------------


def test_the_leak_check_finds_what_is_planted(
    cli: Cli, look_for_leaks: Callable[..., list[str]]
) -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    ends = os.pipe()
    process = cli.start("serve", "--backend=toy", "--name=planted")
    path = cli.runtime / "outrider" / "left.sock"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch()
    try:
        found = "\n".join(look_for_leaks(0.5))
    finally:
        release.set()
        thread.join()
        for end in ends:
            os.close(end)
        path.unlink()
        process.terminate()
        process.communicate()
    for word in ("planted", f"child {process.pid}", "left.sock", "threads", "descriptors"):
        assert word in found


def test_connecting_by_hand_needs_no_running_loop() -> None:
    """`connect` itself opens nothing, so an unused client leaks nothing."""
    assert connect("nobody").pipeline == "nobody"
