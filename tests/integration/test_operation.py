"""Whoever operates a pipeline: counters that add up, a screen, and an end that cuts nobody off."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.conftest import HTTP
from tests.unit.test_metrics import check_identities, failures

from outrider import Client
from outrider.client import AsyncClient
from outrider.core.stats import Report
from outrider.core.values import Mode
from outrider.errors import OutriderError, Overloaded
from outrider_services.pipeline.exposition import exposition

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle, Pipeline, Serve, Served

PROMPT = "The river runs"
SLOW = ("--toy-step-ms=20", "--toy-draft-ms=2")


# ---- counters -----------------------------------------------------------------------------------


async def ask(client: AsyncClient, number: int) -> Report:
    """One of several requests; every third is cancelled on its way."""
    modes: tuple[Mode, ...] = ("pipelined", "sync", "plain", "pipelined")
    stream = await client.create_completion(
        f"Request {number}",
        max_tokens=40 + number,
        mode=modes[number % 4],
        seed=number,
        stream=True,
    )
    async for fragment in stream:
        if number % 3 == 0 and fragment.round >= number % 5:
            await stream.cancel()
    assert stream.stats is not None
    return stream.stats


async def test_the_counters_add_up_over_all_requests(
    pipeline: Callable[..., AbstractAsyncContextManager[Pipeline]],
) -> None:
    async with pipeline() as up, up.connect() as client:
        reports = await asyncio.gather(*(ask(client, number) for number in range(24)))
        with pytest.raises(OutriderError):
            await client.create_completion([99_999])
        await up.idle(client)
        counts = await client.metrics()
        check_identities(counts)
        for metric, figure in (
            ("spec_decode_num_drafts_total", "verify_rounds"),
            ("spec_decode_num_draft_tokens_total", "verified_tokens"),
            ("spec_decode_num_accepted_tokens_total", "accepted_tokens"),
            ("spec_decode_num_created_draft_tokens_total", "drafted_tokens"),
            ("spec_decode_num_hits_total", "hits"),
            ("truncated_tokens_total", "truncated_tokens"),
            ("generation_tokens_total", "generated_tokens"),
        ):
            assert counts[metric] == sum(getattr(report, figure) for report in reports), metric
        success = counts["request_success_total"]
        assert success["cancelled"] == 8
        assert sum(success.values()) == 24
        assert failures(counts) == {"invalid_request": 1}
        assert counts["time_to_first_token_seconds"]["+Inf"] == 24
        firsts = counts["time_to_first_token_seconds"]["+Inf"]
        between = counts["inter_token_latency_seconds"]["+Inf"]
        assert firsts + between == counts["generation_tokens_total"]
        assert counts["e2e_request_latency_seconds"]["+Inf"] == 16
        assert counts["spec_decode_num_discarded_draft_tokens_total"]["failed"] == 0
        await check_lanes(client)
        check_text(exposition(counts))


async def check_lanes(client: AsyncClient) -> None:
    await asyncio.sleep(1.5)  # for a heartbeat of each worker, and an answer to a ping
    counts = await client.metrics()
    busy = counts["lane_busy_seconds_total"]
    # four requests may share a pass, which may bring each of them several tokens
    assert busy["target"] > 24 * 20 * 0.004 / 16
    assert 0 < counts["overlap_seconds_total"] < busy["draft"]
    assert counts["lane_passes_total"]["target"] > counts["spec_decode_num_drafts_total"] / 4
    for table in counts["link_rtt_seconds"].values():
        assert 0 < table["sum"] < table["+Inf"] * 1.0


def check_text(told: str) -> None:
    """Prometheus can read it, by its own program's word where that is here."""
    names = {family.name for family in text_string_to_metric_families(told)}
    assert {"outrider_generation_tokens", "outrider_verify_seconds"} <= names
    if shutil.which("promtool"):
        command = ["promtool", "check", "metrics"]
        checked = subprocess.run(command, input=told, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


# ---- top ----------------------------------------------------------------------------------------


def begin(served: Served, count: int = 1500) -> tuple[Client, Any]:
    """A request that runs for a while, and has its first block."""
    client = Client(served.ipc)
    stream = client.create_completion(
        PROMPT, max_tokens=count, temperature=0, mode="pipelined", stream=True
    )
    next(stream)
    return client, stream


def test_top_shows_a_running_request_and_both_lanes(cli: Cli, serve: Serve) -> None:
    served = serve("seen", *SLOW)
    client, stream = begin(served)
    with client, stream:
        shown = cli("top", "seen", "--once")
        told = json.loads(cli("top", "seen", "--json").stdout)
    assert shown.returncode == 0, shown.stderr
    assert "seen: ok" in shown.stdout
    assert re.search(r"1 running, 0 waiting; [1-9]\d*\.\d tokens/s, \d+% of the", shown.stdout)
    assert re.search(r"^target +\d+% +\S* +\d+\.\d +1 +- .*toy", shown.stdout, re.MULTILINE)
    assert re.search(r"^1 +\w+ +pipelined +14 +\d+ +\d+\.\d +\d+%$", shown.stdout, re.MULTILINE)
    assert PROMPT not in shown.stdout + json.dumps(told)
    (one,) = told["requests"]
    assert (one["id"], one["mode"], one["prompt_tokens"]) == (1, "pipelined", 14)
    busy = {lane["lane"]: lane["busy"] for lane in told["lanes"]}
    assert busy["target"] > 0.5
    assert told["tokens_per_s"] > 20
    assert served.stop() == 143


def test_top_of_nothing_is_one_sentence(cli: Cli) -> None:
    done = cli("top", "nobody", "--once")
    assert done.returncode == 7
    assert done.stderr.startswith("outrider: no coordinator answers")
    assert len(done.stderr.splitlines()) == 1


class Screen:
    """`outrider top` on a terminal of its own."""

    def __init__(self, cli: Cli, *arguments: str) -> None:
        self.fd, inner = pty.openpty()
        self.before = termios.tcgetattr(inner)
        self.inner = inner
        self.seen = ""
        self.process = subprocess.Popen(
            cli._command(("top", *arguments)),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=cli.directory,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is for it
            env={**cli._environment({}), "TERM": "xterm", "LINES": "40", "COLUMNS": "120"},
        )

    def until(self, pattern: str, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, self.seen
            self._read(0.1)

    def _read(self, wait_s: float) -> bool:
        if not select.select([self.fd], [], [], wait_s)[0]:
            return False
        self.seen += os.read(self.fd, 1 << 16).decode("utf-8", "replace")
        return True

    def ends(self) -> int:
        status = self.process.wait(5)
        while self._read(0.1):
            pass
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.fd)
        os.close(self.inner)


@pytest.mark.parametrize(("way", "status"), [("q", 0), ("\x03", 130), (None, 143)])
def test_the_screen_changes_until_it_is_left(
    cli: Cli, serve: Serve, way: str | None, status: int
) -> None:
    served = serve("watched", *SLOW)
    client, stream = begin(served)
    screen = Screen(cli, "watched")
    try:
        with client, stream:
            screen.until(r"1 running(?s:.*)1 running(?s:.*)1 running")
            if way is None:
                screen.process.terminate()
            else:
                os.write(screen.fd, way.encode())
            assert screen.ends() == status
        assert screen.seen.count("\x1b[?1049h") == screen.seen.count("\x1b[?1049l") == 1
        assert "\x1b[2J" not in screen.seen.partition("1 running")[2]  # it would flicker
        assert "Traceback" not in screen.seen
        assert termios.tcgetattr(screen.inner) == screen.before
    finally:
        screen.close()
    assert served.stop() == 143


def test_a_stopped_terminal_does_not_keep_the_screen(cli: Cli, serve: Serve) -> None:
    served = serve("frozen")
    screen = Screen(cli, "frozen")
    try:
        screen.until("frozen: ok")
        os.write(screen.fd, b"\x13")  # Ctrl-S
        time.sleep(2.0)  # it goes on drawing for nobody
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(5) == 130
    finally:
        screen.close()
    assert served.stop() == 143


# ---- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_refuses_new_ones(
    serve: Serve, oracle: Oracle, number: signal.Signals
) -> None:
    served = serve("drained", *SLOW)
    client, stream = begin(served, count=150)
    with client:
        served.process.send_signal(number)
        assert served.line("Finishing") == (
            "Finishing 1 request, for 30 s at most; another signal ends at once.\n"
        )
        wait_until(lambda: client.health()["status"] == "stopping")
        with pytest.raises(Overloaded, match="the pipeline is stopping"):
            client.create_completion(PROMPT, max_tokens=5)
        assert served.process.poll() is None
        assert stream.result().text == oracle(PROMPT, 150).text
    _, err = served.process.communicate(timeout=5)
    assert served.process.returncode == 128 + number
    assert "Traceback" not in err


def test_what_takes_longer_than_the_limit_is_cut_off(serve: Serve) -> None:
    served = serve("cut", "--drain=1", *SLOW)
    client, stream = begin(served)
    with client:
        began = time.monotonic()
        served.process.terminate()
        with pytest.raises(OutriderError, match=r"stopped|closed|gone"):
            stream.result()
        served.process.communicate(timeout=8)
        assert 1.0 <= time.monotonic() - began < 6.0
    assert served.process.returncode == 143


def test_a_second_signal_ends_at_once(serve: Serve) -> None:
    served = serve("twice", *SLOW)
    client, stream = begin(served)
    with client:
        served.process.terminate()
        served.line("Finishing 1 request")
        began = time.monotonic()
        served.process.terminate()
        with pytest.raises(OutriderError):
            stream.result()
        served.process.communicate(timeout=8)
        assert time.monotonic() - began < 5.0
    assert served.process.returncode == 143


def wait_until(check: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_a_supervisor_is_told_when_it_is_ready_and_when_it_stops(
    cli: Cli, runtime: Path, kind: str
) -> None:
    name = f"{runtime}/notify" if kind == "file" else f"\0{runtime}-notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name)
        listening.settimeout(15)
        flags = ("serve", "--name=told", "--backend=toy")
        process = cli.start(*flags, NOTIFY_SOCKET=name.replace("\0", "@"))
        assert listening.recv(100) == b"READY=1"
        with Client(f"ipc://{runtime}/outrider/told.sock") as client:
            assert client.health()["status"] == "ok"
        process.terminate()
        assert listening.recv(100) == b"STOPPING=1"
        process.communicate(timeout=10)
        assert process.returncode == 143
        with suppress(TimeoutError):  # and nothing else
            listening.settimeout(0.1)
            raise AssertionError(listening.recv(100))


# ---- over HTTP ----------------------------------------------------------------------------------


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def test_prometheus_is_told_by_the_gateway(serve: Serve) -> None:
    served = serve("scraped", *HTTP, "--metrics-compat=vllm", *SLOW)
    client, stream = begin(served)
    with client, stream:
        status, told = get(f"{served.url}/metrics")
        slots = json.loads(get(f"{served.url}/slots")[1])
    assert status == 200
    found = {sample.name: sample.value for family in text_string_to_metric_families(told)
             for sample in family.samples}  # fmt: skip
    assert found["outrider_num_requests_running"] == 1
    assert found["outrider_generation_tokens_total"] > 0
    verified = found["outrider_spec_decode_num_draft_tokens_total"]
    assert found["vllm:spec_decode_num_draft_tokens_total"] == verified
    assert (slots[0]["is_processing"], slots[0]["id_task"]) == (True, 1)
    assert slots[0]["next_token"]["n_decoded"] > 0
    assert slots[0]["outrider"]["mode"] == "pipelined"
    assert PROMPT not in json.dumps(slots)
    assert served.stop() == 143


def test_an_answer_over_http_is_finished_after_a_signal(serve: Serve, oracle: Oracle) -> None:
    served = serve("web-drained", *HTTP, *SLOW)
    body = {"prompt": PROMPT, "max_tokens": 150, "temperature": 0}
    asked = urllib.request.Request(
        f"{served.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with ThreadPoolExecutor(1) as pool, Client(served.ipc) as client:
        answer = pool.submit(lambda: urllib.request.urlopen(asked, timeout=20).read())
        wait_until(lambda: client.health()["requests"]["running"] == 1)
        served.process.terminate()
        served.line("Finishing 1 request")
        wait_until(lambda: client.health()["status"] == "stopping")
        status, told = get(f"{served.url}/health")
        assert (status, json.loads(told)["error"]["message"]) == (503, "Stopping")
        text = json.loads(answer.result())["choices"][0]["text"]
    assert text == oracle(PROMPT, 150).text
    served.process.communicate(timeout=8)
    assert served.process.returncode == 143


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="needs systemd")
def test_systemd_may_open_the_socket(cli: Cli) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    kept = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "PYTHONPATH", "OUTRIDER_LOG__FORMAT")
    activate = "systemd-socket-activate", f"--listen=127.0.0.1:{port}"
    cli.prefix = (*activate, *(word for name in kept for word in ("-E", name)))
    process = cli.start("serve", "--name=activated", "--no-gateway=false", "--backend=toy")
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: accepts(port))
    assert get(f"{url}/health")[0] in (200, 503)  # it waited for somebody to take it
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith(f"Ready: {url} | ") for line in lines)
    assert get(f"{url}/health")[0] == 200
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((socket.AF_UNIX, socket.SOCK_STREAM), "one ListenStream"),
        ((socket.AF_INET, socket.SOCK_DGRAM), "one ListenStream"),
        ((socket.AF_INET, socket.SOCK_STREAM), "one ListenStream"),  # it does not listen
    ],
)
def test_a_socket_of_another_kind_is_one_sentence(
    cli: Cli, made: tuple[int, int], words: str
) -> None:
    shell = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0'
    with socket.socket(*made) as one:
        done = subprocess.run(
            [
                "sh",
                "-c",
                shell,
                "sh",
                *cli._command(("serve", "--no-gateway=false", "--backend=toy")),
            ],
            stdin=one.fileno(),
            capture_output=True,
            text=True,
            timeout=20,
            env=cli._environment({}),
            check=False,
        )
    assert done.returncode == 3, done.stderr
    assert words in done.stderr


def accepts(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def test_a_supervisor_that_is_gone_is_no_reason_to_fail(cli: Cli, runtime: Path) -> None:
    process = cli.start("serve", "--name=alone", "--backend=toy", NOTIFY_SOCKET=f"{runtime}/nobody")
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Ready:")
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143
