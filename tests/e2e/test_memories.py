"""Every kind of memory, on tiny models with random weights: see scripts/make-tiny-models.

Set up to be exact, logits are compared bit for bit.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.core.engine import Cancelled, EngineFault, Part
from outrider.core.sampling import Scores
from outrider.core.values import TokenId
from outrider.engines import calibration
from outrider.engines.llama import setup, states
from outrider.engines.llama.engine import LlamaEngine, LlamaSettings
from outrider.errors import ModelUnusable

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

EXACT = LlamaSettings(context=512, slots=3, threads=1, batch=512, ubatch=64, exact=True)
WITH_STATES = ("mamba", "nemotron", "lfm2", "lfm2-window", "qwen35")
KINDS = ("plain", "window", "experts", *WITH_STATES)
TEXT = "The pairs of a hash table lie where their keys say, and the rest of the table is empty."


def loaded(path: Path, **changes: Any) -> LlamaEngine:
    return LlamaEngine.load(path, dataclasses.replace(EXACT, **changes))


@pytest.fixture(
    scope="module",
    params=[
        *((kind, "target") for kind in KINDS),
        *((kind, "without-snapshots") for kind in WITH_STATES[1:]),
        *((kind, "draft") for kind in WITH_STATES),
    ],
    ids="-".join,
)
def engine(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LlamaEngine]:
    kind, how = request.param
    with pytest.MonkeyPatch.context() as patch:
        if how == "without-snapshots":
            patch.setattr(setup, "SNAPSHOT_ROOM", 0)
        engine = loaded(tiny / f"{kind}.gguf", drafts=how == "draft")
    assert (engine._states is not None) == (kind in WITH_STATES)
    if engine._states:
        assert (engine._states._snapshots > 0) == (how == "target" and kind != "mamba")
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=WITH_STATES)
def stateful(request: pytest.FixtureRequest, tiny: Path) -> Iterator[LlamaEngine]:
    engine = loaded(tiny / f"{request.param}.gguf")
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def slots_are_emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the cache holds what the engine says, and is emptied."""
    yield
    for name in {"engine", "stateful"} & set(request.fixturenames):
        used: LlamaEngine = request.getfixturevalue(name)
        for slot in range(used.info.slots):
            assert used._lib.llama_memory_seq_pos_max(used._memory, slot) + 1 == used.length(slot)
            used.rewind(slot, 0)


def hold(engine: LlamaEngine, text: Sequence[TokenId], rows: int, slot: int = 0) -> Scores:
    """What follows the last tokens of `text`, of which the slot holds the beginning."""
    return engine.extend(slot, text[engine.length(slot) :], rows).copy()


def fresh(engine: LlamaEngine, text: Sequence[TokenId], rows: int) -> Scores:
    engine.rewind(2, 0)
    return engine.extend(2, text, rows).copy()


def equal(one: Scores, other: Scores) -> bool:
    return one.shape == other.shape and np.array_equal(one, other)


def test_a_long_text_at_once_equals_one_of_single_tokens(engine: LlamaEngine) -> None:
    tokens = (engine.tokenize(TEXT, special=False) * 2)[:140]
    alone = np.concatenate([engine.extend(0, [token], 1).copy() for token in tokens])
    assert equal(fresh(engine, tokens, len(tokens)), alone)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_after_a_rejection_at_each_position_the_logits_are_those_of_a_fresh_prefill(
    engine: LlamaEngine, block: int
) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    prompt, drafted, (correction, follower) = tokens[:9], tokens[20 : 20 + block], tokens[10:12]
    hold(engine, prompt[:-1], 0)
    for accepted in range(block + 1):
        engine.rewind(0, min(len(prompt) - 1, engine.length(0)))
        hold(engine, [*prompt, *drafted], block + 1)
        engine.rewind(0, len(prompt) + accepted)
        committed = [*prompt, *drafted[:accepted], correction, follower]
        after = hold(engine, committed, 2)
        assert engine.length(0) == len(committed)
        assert equal(after, fresh(engine, committed, 2)), f"{accepted} accepted"


def test_misses_one_after_another_add_up_to_nothing(engine: LlamaEngine) -> None:
    """As a target has them: blocks of all lengths, each cut at another place, then the next."""
    tokens = engine.tokenize(TEXT * 2, special=False)
    text, wrong = tokens[:5], tokens[::-1]
    for at in range(30):
        size = 1 + at % 7
        hold(engine, [*text, *wrong[at : at + size]], size + 1)
        engine.rewind(0, len(text) + at % (size + 1))
        text += [*wrong[at : at + at % (size + 1)], tokens[at]]
    assert equal(hold(engine, text, 1), fresh(engine, text, 1))


def test_a_draft_that_goes_on_by_single_tokens_is_taken_back_as_far_as_asked(
    engine: LlamaEngine,
) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    text = tokens[:12]
    for at, back in enumerate((1, 3, 7, 12, 20, 2)):
        for token in tokens[at : at + 24]:
            text.append(token)
            hold(engine, text, 1)
        del text[-back:]
        engine.rewind(0, len(text))
        if engine._states:
            assert len(text) - engine.length(0) <= engine._states._apart
        text.append(tokens[at])
        assert equal(hold(engine, text, 1), fresh(engine, text, 1)), f"{back} taken back"


@pytest.mark.parametrize("kind", WITH_STATES)
def test_a_far_way_back_reads_again_about_as_much_as_it_took_back(tiny: Path, kind: str) -> None:
    stateful = loaded(tiny / f"{kind}.gguf", drafts=True)
    tokens = (stateful.tokenize(TEXT, special=False) * 8)[:400]
    for at in range(0, 400, 5):
        stateful.extend(0, tokens[at : at + 5], 0)
    for kept in (385, 360, 320):
        stateful.rewind(0, kept)
        assert 0 <= kept - stateful.length(0) <= 2 * (400 - kept)
        assert stateful.length(0) > 0
        assert equal(hold(stateful, tokens[: kept + 1], 1), fresh(stateful, tokens[: kept + 1], 1))
    assert stateful._states
    assert all(len(kept) <= states.KEPT for kept in stateful._states._kept)
    stateful.close()


def test_a_copy_goes_on_by_itself(engine: LlamaEngine) -> None:
    tokens = engine.tokenize(TEXT, special=False)
    hold(engine, tokens[:20], 0)
    for length in (20, 13, 3):
        engine.copy(0, 1, length)
        assert engine.length(1) <= length
        engine.extend(0, tokens[:1], 1)  # what becomes of the source does not matter
        text = [*tokens[:length], *tokens[30:33]]
        assert equal(hold(engine, text, 3, slot=1), fresh(engine, text, 3))
        engine.rewind(0, 20)
        if engine.length(0) < 20:
            hold(engine, tokens[:20], 0)


def test_a_copy_of_what_was_just_taken_back_is_one_of_what_is_left(engine: LlamaEngine) -> None:
    """llama.cpp has noted the way back then, and not gone it yet."""
    tokens = engine.tokenize(TEXT, special=False)
    hold(engine, tokens[:16], 6)
    engine.rewind(0, 13)
    engine.copy(0, 1, engine.length(0))
    for slot in (1, 0):
        text = [*tokens[:13], tokens[40]]
        assert equal(hold(engine, text, 1, slot), fresh(engine, text, 1))


def test_slots_that_share_passes_are_taken_back_each_for_itself(engine: LlamaEngine) -> None:
    """Of unequal numbers, in changing company: cells change places inside llama.cpp."""
    tokens = engine.tokenize(TEXT, special=False)
    texts = [tokens[:4], tokens[10:23], tokens[5:12]]
    for at in range(12):
        slots = [slot for slot in range(3) if (at >> slot) & 1 or slot == at % 3]
        blocks = {slot: tokens[at + slot : at + 2 * slot + 3] for slot in slots[::-1]}
        engine.extend_all(
            [
                Part(slot, [*texts[slot], *block][engine.length(slot) :], len(block))
                for slot, block in blocks.items()
            ]
        )
        for slot, block in blocks.items():
            kept = at % len(block)
            engine.rewind(slot, len(texts[slot]) + kept)
            texts[slot] = [*texts[slot], *block[:kept], tokens[at]]
    for slot in (0, 1):
        assert equal(hold(engine, texts[slot], 1, slot), fresh(engine, texts[slot], 1))


def cancelled(engine: LlamaEngine, parts: Sequence[Part]) -> bool:
    done = threading.Event()

    def keep_cancelling() -> None:
        while not done.is_set():
            engine.cancel()

    thread = threading.Thread(target=keep_cancelling)
    thread.start()
    try:
        engine.extend_all(parts)
    except Cancelled:
        return True
    finally:
        done.set()
        thread.join()
    return False


def test_a_pass_is_cut_short_only_where_there_is_a_way_back(stateful: LlamaEngine) -> None:
    tokens = stateful.tokenize(TEXT, special=False) * 4
    hold(stateful, tokens[:70], 1)
    assert cancelled(stateful, [Part(0, tokens[70:], 1)])
    assert stateful.length(0) == 70
    hold(stateful, tokens[:72], 0)  # nothing is kept of so few tokens more
    assert not cancelled(stateful, [Part(0, tokens[72:100], 1)])
    assert not cancelled(stateful, [Part(0, tokens[100:170], 1), Part(1, tokens[:20], 1)])
    assert equal(hold(stateful, tokens[:172], 2), fresh(stateful, tokens[:172], 2))


def test_a_fault_empties_what_may_be_half_changed(
    stateful: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in (0, 1):
        stateful.extend(slot, [5, 6, 7], 0)
    with monkeypatch.context() as patch:
        patch.setattr(stateful._lib, "llama_decode", lambda context, batch: -3)
        with pytest.raises(EngineFault):
            stateful.extend(0, [5], 1)
    assert [stateful.length(0), stateful.length(1)] == [0, 0]


def test_a_state_that_llama_cpp_does_not_take_is_read_again(
    stateful: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = stateful.tokenize(TEXT, special=False)
    hold(stateful, tokens[:70], 0)
    hold(stateful, tokens[:75], 0)
    with monkeypatch.context() as patch:
        patch.setattr(stateful._lib, "llama_state_seq_set_data_ext", lambda *_: 0)
        stateful.rewind(0, 70)
    assert stateful.length(0) == 0
    assert equal(hold(stateful, tokens[:16], 1), fresh(stateful, tokens[:16], 1))


def test_a_copy_that_llama_cpp_does_not_take_leaves_nothing(
    stateful: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = stateful.tokenize(TEXT, special=False)
    hold(stateful, tokens[:20], 1)
    with monkeypatch.context() as patch:
        patch.setattr(stateful._lib, "llama_state_seq_set_data_ext", lambda *_: 0)
        stateful.copy(0, 1, 20)
    assert stateful.length(1) == 0
    hold(stateful, tokens[30:60], 1, slot=1)  # another text; what was to be copied is forgotten
    stateful.rewind(1, 25)
    text = [*tokens[30:55], tokens[0]]
    assert equal(hold(stateful, text, 1, slot=1), fresh(stateful, text, 1))


def test_a_model_that_does_not_come_back_to_its_state_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states.States, "_put", lambda self, slot, checkpoint: checkpoint.length)
    with pytest.raises(ModelUnusable, match="cannot take back"):
        loaded(tiny / "mamba.gguf")


def test_what_the_states_take_is_about_what_is_reckoned_with(stateful: LlamaEngine) -> None:
    stateful.extend(0, [5], 0)
    lib, context = stateful._lib, stateful._context
    taken = lib.llama_state_seq_get_size_ext(context, 0, states.PARTIAL_ONLY)
    reckoned = setup.state_size(lib, stateful._model)
    assert 0.2 * reckoned < taken < 1.1 * reckoned
    settings = dataclasses.replace(EXACT, context=4096)
    more = (1 + setup.CHECKPOINTS + setup.snapshots(lib, stateful._model, settings)) * reckoned
    needed = setup.needed(lib, stateful._model, settings, 0)
    assert needed > EXACT.slots * more + setup.cache_size(lib, stateful._model, settings)
    for hindrance in ({"drafts": True}, {"ubatch": 2}, {"slots": 250, "ubatch": 2}):
        less = dataclasses.replace(settings, **hindrance)
        assert setup.snapshots(lib, stateful._model, less) == 0


@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ["plain", "window", "lfm2"])
def test_a_quantised_cache_is_taken_back_as_any_other(tiny: Path, kind: str, cache: str) -> None:
    engine = loaded(tiny / f"{kind}.gguf", cache_type_k=cache, cache_type_v=cache)
    test_after_a_rejection_at_each_position_the_logits_are_those_of_a_fresh_prefill(engine, 4)
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_cache_that_slots_share_texts_stay_apart(tiny: Path, kind: str) -> None:
    """Where the order of its cells touches the last bits, the greedy choices stay."""
    engine = loaded(tiny / f"{kind}.gguf", exact=False, unified=True)
    tokens = engine.tokenize(TEXT, special=False)
    want = engine.extend(0, tokens, len(tokens)).copy()
    engine.rewind(0, 0)
    engine.extend_all([Part(0, tokens[:9], 0), Part(1, tokens[::-1], 0)])
    hold(engine, [*tokens[:9], *tokens[20:24]], 4)
    engine.rewind(0, 9)
    engine.copy(0, 2, engine.length(0))
    for slot in (0, 2):
        found = hold(engine, tokens[:12], 3, slot)
        assert np.abs(found - want[9:12]).max() < 0.1 * want.std()
    engine.close()


def test_taking_back_is_measured_as_dear_as_it_is(tiny: Path) -> None:
    cost = {}
    for kind in ("plain", "mamba"):
        engine = loaded(tiny / f"{kind}.gguf")
        assert len(calibration.calibrate(engine, (1, 2, 4, 8))) == 8
        assert len(calibration.calibrate_crowd(engine)) == engine.info.slots
        cost[kind] = calibration.calibrate_rollback(engine)
        assert [engine.length(slot) for slot in range(3)] == [0, 0, 0]
        engine.close()
    assert cost["mamba"] > 3 * cost["plain"]


def test_a_model_in_parts_is_the_same_model(tiny: Path) -> None:
    whole, parts = loaded(tiny / "plain.gguf"), loaded(tiny / "plain-00001-of-00002.gguf")
    tokens = whole.tokenize(TEXT, special=False)
    assert equal(fresh(parts, tokens, 9), fresh(whole, tokens, 9))
    test_after_a_rejection_at_each_position_the_logits_are_those_of_a_fresh_prefill(parts, 4)
    for engine in (whole, parts):
        engine.close()
