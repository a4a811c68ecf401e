"""What nobody can do to the gateway: hold it, flood it, ask without a key, end it for good."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import psutil
import pytest

from outrider_services.gateway import connections, limits, server
from outrider_services.gateway.sockets import listen, url_of
from outrider_services.table import ServerOptions

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Serve, Served

LONG = {"prompt": "Hi", "n_predict": 1900, "speculative.enabled": False}
HTTP = ("--no-gateway=false", "--port=0")


@asynccontextmanager
async def gateway(pipeline: str, **options: Any) -> AsyncIterator[str]:
    """A gateway in this process; its URL."""
    settings = ServerOptions(port=0, **options)
    with listen(settings) as listener:
        url = url_of(listener)
        serving = asyncio.ensure_future(server.serve(settings, pipeline, listener))
        try:
            yield url
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def busy(url: str) -> AsyncIterator[None]:
    """Meanwhile every sequence of the pipeline at `url` is at work."""
    async with httpx2.AsyncClient(base_url=url, timeout=20) as client:
        posts = [asyncio.ensure_future(client.post("/completion", json=LONG)) for _ in range(4)]
        full = "/slots?fail_on_no_slot=1"
        while (await client.get(full)).status_code == 200:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.01)
        yield
        for post in posts:
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)


class Raw:
    """A connection by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, url: str) -> Raw:
        host, port = url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ends_within(self, seconds: float) -> bytes:
        """What comes until the other side ends it."""
        async with asyncio.timeout(seconds):
            with suppress(ConnectionError):
                return await self.reader.read()
        return b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


# ---- silence ------------------------------------------------------------------------------------


async def test_a_stream_that_waits_is_kept_alive_by_comments(web: Served) -> None:
    async with (
        gateway(web.ipc, sse_ping_s=0.05) as url,
        httpx2.AsyncClient() as client,
        busy(web.url),
        client.stream("POST", f"{url}/completion", json={**LONG, "stream": True}) as answer,
    ):
        lines = answer.aiter_lines()
        heard = [await anext(lines) for _ in range(4)]
    assert heard == [": ping", "", ": ping", ""]


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_that_does_not_come_ends_in_time(web: Served, streamed: bool) -> None:
    body = {**LONG, "stream": streamed}
    async with (
        gateway(web.ipc, timeout_s=0.2) as url,
        httpx2.AsyncClient() as client,
        busy(web.url),
    ):
        answer = await client.post(f"{url}/completion", json=body)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"


# ---- connections --------------------------------------------------------------------------------


async def test_a_head_that_does_not_come_is_not_waited_for(
    web: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    async with gateway(web.ipc) as url:
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: x"):
            raw = await Raw.to(url)
            raw.writer.write(sent)
            assert await raw.ends_within(2) == b""
            await raw.close()
        raw = await Raw.to(url)  # also behind an answer, and byte by byte
        raw.writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await raw.reader.readline()).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 2 and not raw.reader.at_eof():
                raw.writer.write(b"G")
                await raw.writer.drain()
                await asyncio.sleep(0.05)
        assert time.monotonic() - began < 1
        await raw.close()


async def test_a_body_that_does_not_come_is_not_waited_for(
    web: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_S", 0.2)
    async with gateway(web.ipc) as url:
        raw = await Raw.to(url)
        head = "POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        raw.writer.write(head.encode() + b"{")
        assert (await raw.ends_within(2)).startswith(b"HTTP/1.1 408")
        await raw.close()


@pytest.mark.parametrize("told", [True, False])
async def test_a_body_that_is_too_long_is_refused(web: Served, told: bool) -> None:
    body = b" " * ((1 << 20) + 1)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), 1 << 16):
            yield body[at : at + (1 << 16)]

    async with httpx2.AsyncClient(base_url=web.url) as client:
        answer = await client.post("/completion", content=body if told else pieces())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


async def test_what_is_no_http_is_refused_and_ends(web: Served) -> None:
    for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70_000):
        raw = await Raw.to(web.url)
        raw.writer.write(sent)
        assert (await raw.ends_within(2)).startswith(b"HTTP/1.1 400")
        await raw.close()


async def test_connections_are_bounded(web: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST", 3)
    async with gateway(web.ipc) as url:
        held = [await Raw.to(url) for _ in range(3)]
        await asyncio.sleep(0.05)
        late = await Raw.to(url)
        assert await late.ends_within(2) == b""
        for raw in [*held, late]:
            await raw.close()
        await asyncio.sleep(0.05)
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"{url}/health")).status_code == 200


async def test_requests_at_once_are_bounded_but_health_is_told(
    web: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST", 1)
    async with gateway(web.ipc) as url, httpx2.AsyncClient(base_url=url) as client:
        async with client.stream("POST", "/completion", json={**LONG, "stream": True}) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            refused = await client.get("/props")
            assert (await client.get("/health")).status_code == 200
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")


async def test_a_reader_that_stops_is_cut_and_frees_its_sequence(
    web: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "STALLED_S", 0.3)
    body = json.dumps({**LONG, "stream": True, "return_provenance": True}).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    async with gateway(web.ipc) as url, web.connect() as other, asyncio.timeout(25):
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            reader.sendall(head.encode() + body)
            while "its client does not read" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            left = True
            while left:
                left = any((await other.health())["requests"].values())


# ---- who may ask --------------------------------------------------------------------------------


def test_keys_are_asked_for_and_told_to_nobody(cli: Cli, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("from-the-file\n")
    file.chmod(0o600)
    environment = {"OUTRIDER_SERVER__API_KEY": '["from,the,variable"]'}
    flags = ("--backend=toy", "--name=keyed", *HTTP, f"--api-key-file={file}", "--log-level=debug")
    process = cli.start("serve", *flags, **environment)
    assert process.stderr
    log = [next(iter(process.stderr.readline, ""))]
    while "Ready: " not in log[-1]:
        log.append(process.stderr.readline())
    url = log[-1].split()[1]
    told = [" ".join(one.cmdline()) for one in psutil.Process(process.pid).children()]
    with httpx2.Client(base_url=url) as client:
        for path, status in (("/health", 200), ("/v1/models", 401), ("/openapi.json", 401)):
            assert client.get(path).status_code == status
        answer = client.get("/v1/models", headers={"Authorization": "Bearer wrong-one"})
        assert answer.headers["www-authenticate"] == "Bearer"
        log.append(answer.text)
    for key in ("from-the-file", "from,the,variable"):
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as known:
            assert known.models.list().data[0].id == "toy-target"
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong-one", max_retries=0)
    with wrong as unknown, pytest.raises(openai.AuthenticationError):
        unknown.models.list()
    process.terminate()
    log.append(process.communicate(timeout=10)[1])
    for secret in ("from-the-file", "from,the,variable", "wrong-one"):
        assert secret not in "".join(log) + "".join(told)


async def test_a_request_is_cancelled_only_with_its_own_key(web: Served) -> None:
    async with gateway(web.ipc, api_key=("a", "b")) as url:
        own, other = ({"Authorization": f"Bearer {key}"} for key in "ab")
        async with httpx2.AsyncClient(base_url=url, timeout=20) as client:
            body = {**LONG, "stream": True}
            named = {**own, "X-Request-Id": "mine"}
            async with client.stream("POST", "/completion", json=body, headers=named) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                again = await client.post("/completion", json=body, headers=named)
                assert again.status_code == 400
                path = "/v1/requests/mine"
                assert (await client.delete(path, headers=other)).status_code == 404
                assert (await client.delete(path, headers=own)).status_code == 200
                *_, last = [line async for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["stop_type"] == "none"


async def test_other_names_and_other_pages_are_refused(web: Served) -> None:
    page = {"Origin": "https://chat.example"}
    asked = {"prompt": "Hi", "n_predict": 1}
    async with httpx2.AsyncClient(base_url=web.url) as client:
        wrong = await client.get("/health", headers={"Host": "evil.example"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "host_not_allowed")
        wrong = await client.post("/completion", json=asked, headers=page)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in wrong.headers
    async with (
        gateway(web.ipc, allow_origin=(page["Origin"],)) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        answer = await client.post("/completion", json=asked, headers=page)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (
            200,
            page["Origin"],
        )


# ---- the process --------------------------------------------------------------------------------


async def test_a_stream_that_fails_says_so_and_the_next_one_is_served(
    pipeline: Callable[..., Any],
) -> None:
    async with (
        pipeline(coordinator__resume_s=0.0) as up,
        gateway(up.name) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        httpx2.AsyncClient(base_url=url) as http,
        up.connect() as other,
    ):
        asked: Any = {"model": "", "prompt": "Hi"}
        stream = await client.completions.create(**asked, max_tokens=1900, stream=True)
        await anext(stream)
        os.kill(up.pids()["target"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="target worker is gone"):
            async for _ in stream:
                pass
        loading = await http.get("/health")
        assert (loading.status_code, loading.json()["error"]["code"]) == (503, 503)
        refused = await http.post("/completion", json={"prompt": "Hi", "n_predict": 1})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "worker_unavailable"
        await up.joined(other, "target")
        answer = await client.completions.create(**asked, max_tokens=3)
        assert answer.usage.completion_tokens == 3


async def test_without_a_coordinator_it_is_loading_and_comes_to_one_that_comes(
    pipeline: Callable[..., Any],
) -> None:
    async with gateway("test") as url, httpx2.AsyncClient(base_url=url) as client:
        assert (await client.get("/health")).status_code == 503
        for path in ("/v1/models", "/props", "/slots"):
            assert (await client.get(path)).status_code == 503
        for _ in range(2):
            async with pipeline(name="test"):
                answer = await client.post("/completion", json={"prompt": "Hi", "n_predict": 3})
                assert answer.json()["tokens_predicted"] == 3
            assert (await client.get("/health")).status_code == 503


def test_a_gateway_that_dies_is_started_again_on_its_port(serve: Serve) -> None:
    served = serve("dies", *HTTP)
    killed = served.pids()["gateway"]
    with httpx2.Client(base_url=served.url, timeout=10) as client:
        assert client.get("/health").status_code == 200
        os.kill(killed, signal.SIGKILL)
        while True:  # bounded by the test's own time
            with suppress(httpx2.TransportError):
                if client.get("/health").status_code == 200:
                    break
    assert served.pids()["gateway"] != killed
    assert served.stop() == 143


def test_a_gateway_of_its_own_serves_a_pipeline_that_is_up(cli: Cli, serve: Serve) -> None:
    served = serve("apart")
    process = cli.start("gateway", "--connect=apart", "--port=0", "--alias=mine")
    assert process.stderr
    url = process.stderr.readline().split()[1]
    with httpx2.Client(base_url=url, timeout=10) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert served.stop() == 143


def test_a_port_that_is_taken_is_one_sentence(cli: Cli) -> None:
    with listen(ServerOptions(port=0)) as listener:
        port = listener.getsockname()[1]
        for verb in ("serve", "gateway"):
            done = cli(verb, f"--port={port}", OUTRIDER_SERVER__NO_GATEWAY="false")
            assert done.returncode == 3, done.stderr
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"outrider: port {port} is taken: choose another --port")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host=0.0.0.0",), "--api-key-file"),
        (("--host=nothing.invalid",), "--host nothing.invalid"),
        (("--api-key-file=/nothing",), "/nothing"),
        (("--port=70000",), "--port must be from 0 to 65535"),
    ],
)
def test_a_wrong_flag_is_one_sentence(cli: Cli, flags: tuple[str, ...], words: str) -> None:
    for verb in ("serve", "gateway"):
        done = cli(verb, *flags, OUTRIDER_SERVER__NO_GATEWAY="false")
        assert done.returncode == 3, done.stderr
        (line,) = done.stderr.splitlines()
        assert words in line
