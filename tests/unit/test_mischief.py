"""What makes trouble in `tests/chaos` makes it as told, or withstanding it would say little."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import msgpack
import pytest
import zmq
from tests.chaos import golden, mutation
from tests.chaos.fuzz import Judge
from tests.chaos.gaps import Gaps, share
from tests.chaos.planted import BUGS, FEW
from tests.chaos.proxy import Mischief, Proxy
from tests.chaos.virtual import NothingHappens, Owner, virtual_time

from outrider.errors import ProtocolError
from outrider.wire.codec import decode

ROOT = Path(__file__).parents[2]


# ---- malformed input ----------------------------------------------------------------------------


def test_golden_frames_are_good_and_of_every_kind() -> None:
    kinds = Counter(type(decode(frame)) for frame in golden.frames())
    assert kinds.keys() == set(golden.KINDS)


def test_the_values_in_a_frame_are_found() -> None:
    frame = msgpack.packb(["a", 1, [2.5, b"xy", {"k": -70000}], None, 1 << 40, "u" * 300])
    values = [msgpack.unpackb(frame[start:end]) for start, end in mutation.nodes(frame)]
    inner = [2.5, b"xy", {"k": -70000}]
    assert values[1:] == [
        "a",
        1,
        inner,
        2.5,
        b"xy",
        {"k": -70000},
        "k",
        -70000,
        None,
        1 << 40,
        "u" * 300,
    ]


def test_most_malformed_frames_are_refused_and_some_are_taken() -> None:
    make, taken = mutation.Frames(golden.frames(), random.Random(1)), 0
    for _ in range(2000):
        try:
            decode(make())
        except ProtocolError:
            continue
        taken += 1
    assert 20 < taken < 1000


def test_the_same_seed_makes_the_same_input() -> None:
    def some() -> list[bytes]:
        rng = random.Random(3)
        make = mutation.Frames(golden.frames(), rng)
        frames = [make() for _ in range(50)]
        return [*frames, *(mutation.body(rng, golden.bodies()[0][1]) for _ in range(50))]

    assert some() == some()


def test_sound_bodies_are_json_and_sound_files_are_sound(tmp_path: Path) -> None:
    from outrider_services.models.gguf import check_gguf
    from outrider_services.sources import from_file

    for _, body in golden.bodies():
        json.loads(body)
    model = tmp_path / "model.gguf"
    model.write_bytes(golden.gguf())
    assert check_gguf(model).tensors == 2
    for text in golden.toml():
        (tmp_path / "outrider.toml").write_bytes(text)
        assert from_file(tmp_path / "outrider.toml")


def test_control_an_error_of_another_kind_is_a_fault() -> None:
    judge = Judge("1")

    def fails() -> None:
        raise KeyError("what nobody expects")

    def refuses() -> None:
        raise ProtocolError("as it should")

    assert not judge.check(b"x", refuses, ProtocolError)
    assert judge.complaints == []
    assert not judge.check(b"x", fails, ProtocolError)
    assert "KeyError" in judge.complaints[0]


# ---- planted bugs -------------------------------------------------------------------------------


def test_every_planted_bug_fits_the_source_and_names_a_test() -> None:
    assert len(BUGS) >= 25
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert set(FEW) < set(BUGS)
    for bug in BUGS:
        source = (ROOT / bug.file).read_text()
        assert source.count(bug.old) == 1, f"{bug.name}: fits {source.count(bug.old)} places"
        compile(source.replace(bug.old, bug.new), bug.file, "exec")
        file, _, test = bug.test.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(), bug.test


# ---- time and waits -----------------------------------------------------------------------------


def test_in_virtual_time_an_hour_takes_no_time() -> None:
    real = time.monotonic
    began = real()
    with virtual_time() as loop:
        owner = Owner(loop)

        async def compute() -> float:
            start = time.monotonic()
            await loop.run_in_executor(owner, owner.sleep, 3600.0)
            return time.monotonic() - start

        assert loop.run_until_complete(compute()) == pytest.approx(3600.0)
    assert real() - began < 10.0
    assert time.monotonic is real


def test_in_virtual_time_waiting_for_nothing_is_found() -> None:
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    with virtual_time() as loop, pytest.raises(NothingHappens):
        loop.run_until_complete(wait())


def test_the_longest_wait_around_a_strike_is_found() -> None:
    gaps = Gaps()
    for at in (0.0, 0.1, 0.2, 0.9, 1.0, 1.1):
        gaps.note(1, at)
    assert gaps.longest(0.15) == pytest.approx(0.7)
    assert gaps.longest(0.95) == pytest.approx(0.1)
    assert gaps.has_all(1.05)
    assert not gaps.has_all(1.1)
    assert share([3.0, 1.0, 2.0], 0.5) == 2.0


# ---- the proxy ----------------------------------------------------------------------------------


def sent(mischief: Mischief, count: int) -> tuple[list[int], Counter[str]]:
    """What of 0, 1, 2 … comes through such a proxy, and what it says that it did."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    came: list[int] = []
    with Proxy(f"tcp://127.0.0.1:{port}", mischief, "1") as proxy:
        dealer = context.socket(zmq.DEALER)
        dealer.connect(proxy.address)
        for number in range(count):
            dealer.send(msgpack.packb(["beat", number, False, 0.0, 0]))
        while router.poll(500):
            frame = router.recv_multipart()[1]
            try:
                came.append(msgpack.unpackb(frame)[1])
            except Exception:  # it was damaged
                came.append(-1)
    context.destroy(linger=0)
    assert threading.active_count() < 50
    return came, proxy.seen


def test_a_proxy_passes_everything_on_if_it_is_to() -> None:
    came, _ = sent(Mischief(), 50)
    assert came == list(range(50))


def test_a_proxy_does_what_it_is_told() -> None:
    came, seen = sent(Mischief(lost=0.2, twice=0.2, overtaken=0.2, damaged=0.1), 200)
    assert 0.1 < seen["lost"] / 200 < 0.3
    assert len(set(range(200)) - set(came)) >= seen["lost"]
    assert came.count(-1) > 0
    assert [one for one in came if one >= 0] != sorted(one for one in came if one >= 0)
    assert any(count > 1 for number, count in Counter(came).items() if number >= 0)
