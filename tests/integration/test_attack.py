"""A tenth of `scripts/attack`, and a short `scripts/soak`: whatever is done, nothing goes wrong."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
from tests.attack import clients, report
from tests.attack.arms import ARMS
from tests.attack.campaign import Campaign, Result, grown
from tests.attack.questions import Question, answer_to, fault_in, text_of
from tests.attack.service import ROLES, ROOT, Pauses, Service, Usage
from tests.attack.soak import Soak

from outrider.wire import messages as wire
from outrider.wire.router import Router

SHARE, SEED = 0.1, 1


class Running:
    """A campaign whose twin stays up from test to test."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._campaign = Campaign(SHARE, SEED)
        self._twin = self._campaign.twin()
        self._runner.run(self._twin.__aenter__())

    def complaints(self, *names: str) -> dict[str, list[str]]:
        """Run these arms together; what is not as it should be, by arm."""

        async def run() -> dict[str, list[str]]:
            arms = [arm for arm in ARMS if arm.name in names]
            results = await asyncio.gather(*map(self._campaign.run, arms))
            return {one.arm.name: one.complaints for one in results if one.complaints}

        return self._runner.run(run())

    def close(self) -> None:
        self._runner.run(self._twin.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture(scope="module")
def campaign() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [arm.name for arm in ARMS if arm.timed])
def test_an_attack_harms_nobody_else(campaign: Running, name: str) -> None:
    for _ in range(3):  # a busy machine slows an answer down by itself, but not each time
        found = campaign.complaints(name)
        if not all("usual time" in one for one in found.get(name, ["another"])):
            break
    assert found == {}


@pytest.mark.timeout(180)
def test_signals_and_fake_workers_change_no_token_and_leave_nobody_waiting(
    campaign: Running,
) -> None:
    assert campaign.complaints(*(arm.name for arm in ARMS if not arm.timed)) == {}


@pytest.mark.timeout(120)
def test_a_mixed_load_goes_on_while_processes_die_and_stop() -> None:
    soak = [str(ROOT / "scripts/soak"), "--seconds=20", "--every=4"]
    done = subprocess.run(soak, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No text was wrong, and nothing has grown." in done.stdout


@pytest.mark.timeout(60)
@pytest.mark.parametrize("script", ["attack", "soak"])
def test_sigterm_ends_all_that_a_script_has_started(script: str) -> None:
    def started() -> list[int]:
        children = psutil.Process(running.pid).children(recursive=True)
        return [child.pid for child in children]

    running = subprocess.Popen([str(ROOT / "scripts" / script)])
    try:
        for _ in range(200):
            if len(pids := started()) >= 4:  # launcher, coordinator, target, draft
                break
            time.sleep(0.1)
        running.terminate()
        assert running.wait(30) == 143
        assert len(pids) >= 4
        assert not any(psutil.pid_exists(pid) for pid in pids)
    finally:
        running.kill()
        running.wait()


# ---- controls: what they look for would be found ------------------------------------------------


def test_an_answer_that_is_not_the_references_is_called_wrong() -> None:
    question = Question("The river", 40)
    ids = list(answer_to(question))
    text, _ = text_of(ids, (), True)
    assert fault_in(question, ids, text, "length") is None
    half, _ = text_of(ids[:20], (), False)
    assert fault_in(question, ids[:20], half, None) is None
    other = [*ids[:7], ids[7] ^ 1, *ids[8:]]
    assert fault_in(question, other, text, "length") == "token 7 after 'The river' is wrong"
    assert (
        fault_in(question, ids[:20], half, "length") == "20 tokens after 'The river' instead of 40"
    )
    assert "the text after" in str(fault_in(question, ids, text + "x", "length"))
    assert "token 40" in str(fault_in(question, [*ids, 32], text + " ", "length"))


async def test_a_client_that_is_left_without_an_outcome_is_called_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its coordinator is alive and says nothing; while it was stopped by us it need not."""
    monkeypatch.setattr(clients, "HANG_S", 0.5)

    def answer(peer: bytes, message: wire.Message) -> None:
        if isinstance(message, wire.Health):
            router.send(peer, wire.HealthReport(message.call, {}))

    router = Router(answer, lambda _: None)
    pauses = Pauses()
    try:
        address = router.bind("tcp://127.0.0.1:0")
        began = time.monotonic()
        pauses.add(began, began + 1.0)
        question = Question("The river", 4)
        async with clients.Crowd([address], [lambda: question], pauses) as crowd:
            for _ in range(100):
                if not crowd.outcomes:
                    await asyncio.sleep(0.05)
        (hung,) = crowd.outcomes
        assert (hung.kind, hung.what) == ("hung", "after 0 tokens")
        assert 1.4 < hung.took_s < 3.0
    finally:
        router.close()


@pytest.mark.parametrize(
    ("twin_s", "found"),
    [(1.0, ["an answer took 2.00 × its usual time"]), (1.5, [])],
    ids=["the-machine-is-as-usual", "the-machine-is-slower-itself"],
)
def test_an_answer_that_took_too_long_is_told(twin_s: float, found: list[str]) -> None:
    campaign = Campaign(SHARE, SEED)
    calm = [clients.Outcome(0, "right", "", at, at + 1.0) for at in (0.0, 1.0, 2.0)]
    campaign.times.add("2 streams", calm)
    campaign.times.add("twin", calm)
    campaign.twins = [clients.Outcome(0, "right", "", 10.0, 10.0 + twin_s)]
    result = Result(ARMS[0], began=3.0)
    result.outcomes = [clients.Outcome(0, "right", "", 10.0, 12.0)]
    campaign.judge_times("2 streams", 20.0, result)
    assert result.complaints == found


def test_what_a_process_keeps_is_told() -> None:
    before = {"coordinator": Usage(30 << 20, 20, 4, 0.0), "target": Usage(30 << 20, 20, 4, 0.0)}
    after = {"coordinator": Usage(42 << 20, 20, 4, 9.0), "target": Usage(39 << 20, 21, 9, 9.0)}
    assert grown(before, before) == []
    assert grown(before, after) == [
        "memory of the coordinator 1.40 ×",
        "21 descriptors of the target, not 20",
    ]


def test_the_command_says_by_its_status_whether_all_is_as_it_should_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complaints: list[str] = []

    async def attacked(*_: object) -> list[Result]:
        return [Result(ARMS[0], complaints=complaints)]

    monkeypatch.setattr(report, "attacked", attacked)
    assert report.main(["--only", "none"]) == 0
    complaints.append("3 × wrong")
    assert report.main(["--only", "none"]) == 1
    assert "3 × wrong" in capsys.readouterr().out
    assert report.main(["--list"]) == 0
    assert all(arm.help in capsys.readouterr().out for arm in ARMS[:1])


def test_a_soak_tells_what_has_grown_and_what_no_death_explains() -> None:
    soak = Soak(cast(Service, SimpleNamespace(left=[], pauses=Pauses())), 1000.0, 20.0, SEED)
    use = Usage(30 << 20, 20, 4, 0.0)
    soak.first = soak.last = dict.fromkeys(ROLES, use)
    soak.samples = [(float(at), dict.fromkeys(ROLES, use)) for at in range(1000)]
    soak.striker.struck = [("target", 100.0, 101.0)]
    lost = clients.Outcome(0, "failed", "worker_unavailable", 99.0, 100.5)
    soak.outcomes = [lost]
    assert soak.verdict() == []
    soak.outcomes = [lost, clients.Outcome(0, "failed", "worker_unavailable", 300.0, 300.5)]
    soak.samples[900:] = [
        (float(at), {**dict.fromkeys(ROLES, use), "launcher": Usage(40 << 20, 20, 4, 0.0)})
        for at in range(900, 1000)
    ]
    soak.last = {**soak.first, "draft": Usage(30 << 20, 21, 4, 0.0)}
    assert soak.verdict() == [
        "1 × worker_unavailable that no death explains",
        "memory of the launcher 1.33 ×",
        "21 descriptors of the draft, not 20",
    ]
