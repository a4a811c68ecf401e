"""`ToyEngine`: as strict, as repeatable and as interruptible as a real engine must be."""

from __future__ import annotations

import codecs
import itertools
import statistics
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import alone

from outrider.core.engine import Cancelled, Engine
from outrider.core.sampling import Sampling, Scores, choose, propose
from outrider.core.values import TokenId
from outrider.engines.toy import MOST_SAID, SPACE, WORDS, ToyCosts, ToyEngine, ToySettings
from outrider.engines.toy_text import ASSISTANT, CONTROLS, END, SAY, SMALLEST
from outrider.errors import BadRequest

quiet = settings(derandomize=True, database=None, deadline=None)
PROMPT = list(b"The future of AI is ")


def generate(engine: ToyEngine, count: int, given: Sampling, slot: int = 0) -> list[TokenId]:
    tokens = list(PROMPT)
    row = engine.extend(slot, tokens, 1)[0]
    for _ in range(count):
        tokens.append(choose(row, given, tokens, len(tokens)))
        row = engine.extend(slot, tokens[-1:], 1)[0]
    return tokens[len(PROMPT) :]


def row_after(engine: ToyEngine, tokens: list[TokenId], slot: int = 0) -> Scores:
    engine.rewind(slot, 0)
    row: Scores = engine.extend(slot, tokens, 1)[0]
    return row


def agreed(agreement: float, given: Sampling, count: int) -> float:
    """How often a draft's own choice is the target's, along the target's text."""
    target = ToyEngine()
    draft = ToyEngine(ToySettings(role="draft", agreement=agreement))
    tokens, equal = list(PROMPT), 0
    new = tokens
    for _ in range(count):
        ours = choose(target.extend(0, new, 1)[0], given, tokens, len(tokens))
        equal += ours == choose(draft.extend(0, new, 1)[0], given, tokens, len(tokens))
        new = [ours]
        tokens.append(ours)
    return equal / count


def test_it_is_an_engine() -> None:
    engine: Engine = ToyEngine()
    assert engine.info.vocabulary.size == SMALLEST
    assert engine.info.vocabulary.ends == (END,)


# --- scores ---------------------------------------------------------------------------------------


def test_two_engines_say_the_same_and_another_seed_something_else() -> None:
    greedy = Sampling(temperature=0)
    first = generate(ToyEngine(), 80, greedy)
    assert generate(ToyEngine(), 80, greedy, slot=3) == first
    assert generate(ToyEngine(ToySettings(seed=1)), 80, greedy) != first


@quiet
@given(st.lists(st.integers(0, SMALLEST - 1), min_size=2, max_size=12), st.data())
def test_rows_depend_on_the_prefix_and_not_on_how_it_came(
    tokens: list[TokenId], data: object
) -> None:
    assert isinstance(data, st.DataObject)
    cut = data.draw(st.integers(1, len(tokens) - 1))
    engine = ToyEngine(ToySettings(role="draft"))
    at_once = engine.extend(0, tokens, len(tokens)).copy()
    engine.extend(1, tokens[:cut], 0)
    engine.extend(1, [5, 6, 7], 1)
    engine.rewind(1, cut)
    rest = engine.extend(1, tokens[cut:], len(tokens) - cut)
    assert rest.tolist() == at_once[cut:].tolist()


def test_the_text_is_words_and_valid_utf8() -> None:
    engine = ToyEngine()
    for temperature in (0, 0.1, 0.7):
        tokens = generate(engine, 1500, Sampling(temperature=temperature))
        engine.rewind(0, 0)
        decoder = codecs.getincrementaldecoder("utf-8")("strict")  # may stop inside a character
        words = decoder.decode(b"".join(map(engine.piece, tokens))).split(" ")
        assert 150 < len(words) < 500
        assert {"lantern", "café", "東京", "🚀"} <= set(words)


def test_sampling_has_several_candidates_to_choose_from() -> None:
    given = [Sampling(temperature=1, seed=seed) for seed in range(12)]
    assert len({tuple(generate(ToyEngine(), 10, each)) for each in given}) > 6


def test_only_asked_for_does_the_end_token_come() -> None:
    hot = Sampling(temperature=1)
    assert max(generate(ToyEngine(), 1500, hot)) < END
    ending = generate(ToyEngine(ToySettings(end_probability=0.05)), 1500, hot)
    words = sum(token in b" " for token in ending if token < END)
    assert 0.02 < ending.count(END) / words < 0.1


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.8, 1.0])
def test_a_draft_agrees_as_often_as_set(agreement: float) -> None:
    measured = agreed(agreement, Sampling(temperature=0), 1500)
    assert measured == pytest.approx(agreement, abs=0.05 if 0 < agreement < 1 else 0)


def test_coupled_choices_agree_more_often_than_favourites() -> None:
    assert agreed(1.0, Sampling(temperature=1), 300) == 1
    assert 0.8 < agreed(0.8, Sampling(temperature=1), 1000) < 1


def test_a_disagreeing_draft_is_less_sure() -> None:
    greedy = Sampling(temperature=0)

    def confidence(agreement: float) -> float:
        row = row_after(ToyEngine(ToySettings(role="draft", agreement=agreement)), PROMPT)
        return propose(row, greedy, PROMPT, len(PROMPT)).confidence

    assert confidence(0.0) < confidence(1.0)


def test_the_next_extend_spoils_the_view_of_the_last() -> None:
    engine = ToyEngine()
    view = engine.extend(0, PROMPT, 2)
    engine.extend(0, [1], 0)
    assert np.isnan(view).all()


# --- the sequence ---------------------------------------------------------------------------------


def test_length_counts_and_rewind_forgets() -> None:
    engine = ToyEngine()
    engine.extend(2, PROMPT, 0)
    assert (engine.length(2), engine.length(0)) == (len(PROMPT), 0)
    engine.rewind(2, 3)
    assert engine.length(2) == 3
    engine.rewind(2, 0)
    assert engine.length(2) == 0


@pytest.mark.parametrize(
    ("slot", "tokens", "rows"),
    [
        (4, [1], 1),
        (-1, [1], 1),
        (0, [], 0),
        (0, [1] * 9, 1),
        (0, [1], 2),
        (0, [1], -1),
        (0, [SMALLEST], 1),
        (0, [-1], 1),
        (1, [1, 2, 3], 1),
    ],
    ids=["slot", "slot<0", "empty", "chunk", "rows", "rows<0", "token", "token<0", "context"],
)
def test_what_is_out_of_range_is_refused_before_anything_changes(
    slot: int, tokens: list[TokenId], rows: int
) -> None:
    engine = ToyEngine(ToySettings(context=10, chunk=8))
    engine.extend(1, [1] * 8, 1)
    with pytest.raises(ValueError, match=r"\w"):
        engine.extend(slot, tokens, rows)
    assert [engine.length(slot) for slot in range(4)] == [0, 8, 0, 0]


def test_a_full_context_is_allowed() -> None:
    engine = ToyEngine(ToySettings(context=10))
    engine.extend(0, [1] * 10, 1)
    assert engine.length(0) == 10


@pytest.mark.parametrize(("slot", "length"), [(0, 4), (0, -1), (9, 0)])
def test_a_rewind_out_of_range_is_refused(slot: int, length: int) -> None:
    engine = ToyEngine()
    engine.extend(0, [1, 2, 3], 0)
    with pytest.raises(ValueError, match=r"\w"):
        engine.rewind(slot, length)


def test_a_closed_engine_refuses_work() -> None:
    engine = ToyEngine()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.extend(0, [1], 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"agreement": 1.1},
        {"end_probability": -1},
        {"context": 0},
        {"vocabulary_size": 256},
        {"role": "judge"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ToySettings(**wrong)  # type: ignore[arg-type]


def test_negative_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="costs"):
        ToyCosts(row_s=-1)


# --- time -----------------------------------------------------------------------------------------


def test_costs_add_up() -> None:
    costs = ToyCosts(first_row_s=1.0, row_s=0.1, prefill_row_s=0.01)
    assert costs.of(1, 1) == pytest.approx(1.0)
    assert costs.of(5, 5) == pytest.approx(1.4)
    assert costs.of(5, 0) == pytest.approx(0.05)
    assert costs.of(5, 2) == pytest.approx(1.13)


def test_a_curve_stands_for_costs_that_no_slope_describes() -> None:
    costs = ToyCosts(first_row_s=9.0, prefill_row_s=0.01, curve_s=(1.0, 3.0, 3.5))
    assert [costs.of(rows, rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 3.0, 3.5, 4.0, 5.0]
    assert costs.of(4, 0) == pytest.approx(0.04)
    assert ToyCosts(curve_s=(1.0,)).of(7, 7) == 1.0
    with pytest.raises(ValueError, match="costs"):
        ToyCosts(curve_s=(1.0, -1.0))


def test_extend_takes_its_time_without_the_processor() -> None:
    engine = ToyEngine(ToySettings(costs=ToyCosts(first_row_s=0.1)))
    begin, busy = time.monotonic(), time.thread_time()
    engine.extend(0, [1], 1)
    assert time.monotonic() - begin > 0.099
    assert time.thread_time() - busy < 0.05


def test_extend_takes_its_time_however_late_waits_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            time.sleep(timeout + 4e-4)
            return self.is_set()

    monkeypatch.setattr(threading, "Event", Late)
    engine = ToyEngine(ToySettings(costs=ToyCosts(first_row_s=0.003)))
    took = []
    for _ in range(80):
        begin = time.monotonic()
        engine.extend(0, [1], 1)
        took.append(time.monotonic() - begin)
    assert abs(statistics.median(took[40:]) - 0.003) < 2e-4


def test_cancel_cuts_extend_short_and_leaves_the_sequence_as_it_was() -> None:
    engine = ToyEngine(ToySettings(costs=ToyCosts(prefill_row_s=20.0)))
    caught: list[bool] = []

    def work() -> None:
        try:
            engine.extend(0, PROMPT, 0)
        except Cancelled:
            caught.append(True)

    worker = threading.Thread(target=work)
    worker.start()
    while not caught and worker.is_alive():
        engine.cancel()  # again and again: it may come before `extend` has begun
        worker.join(0.001)
    worker.join()
    assert caught
    assert engine.length(0) == 0


def test_cancelling_an_idle_engine_does_not_harm_the_next_extend() -> None:
    engine = ToyEngine(ToySettings(costs=ToyCosts(first_row_s=0.001)))
    engine.cancel()
    engine.extend(0, [1], 1)
    engine.cancel()
    engine.extend(0, [1], 1)
    assert engine.length(0) == 2


# --- text -----------------------------------------------------------------------------------------


@quiet
@given(st.text())
def test_text_round_trips(text: str) -> None:
    engine = ToyEngine()
    for special in (False, True):
        tokens = engine.tokenize(text, special=special)
        assert b"".join(map(engine.piece, tokens)) == text.encode(errors="replace")


def test_markers_become_control_tokens_only_when_asked() -> None:
    engine = ToyEngine()
    assert engine.tokenize("<|end|>é", special=True) == [END, 0xC3, 0xA9]
    assert max(engine.tokenize("<|end|>", special=False)) < 256
    assert engine.piece(END) == b""
    assert engine.label(END) == "<|end|>"


def test_the_template_is_made_of_control_tokens() -> None:
    engine = ToyEngine()
    text = engine.render([("system", "Be brief."), ("user", "Hi")])
    assert text == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    controls = [token for token in engine.tokenize(text, special=True) if token >= 256]
    assert [engine.label(token) for token in controls] == [
        "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"
    ]  # fmt: skip


def test_a_role_without_a_marker_is_refused() -> None:
    with pytest.raises(BadRequest, match="end"):
        ToyEngine().render([("end", "")])


def test_a_variant_of_the_vocabulary_differs_in_one_label() -> None:
    usual, other = ToyEngine(), ToyEngine(ToySettings(vocabulary_variant=1))
    differing = [token for token in range(SMALLEST) if usual.label(token) != other.label(token)]
    assert differing == [SMALLEST - 1]
    assert usual.info.vocabulary.digest != other.info.vocabulary.digest
    assert usual.info.vocabulary.size == other.info.vocabulary.size


def test_labels_are_distinct_and_a_larger_vocabulary_has_more_of_them() -> None:
    engine = ToyEngine(ToySettings(vocabulary_size=300))
    labels = [engine.label(token) for token in range(300)]
    assert len(set(labels)) == 300
    assert tuple(labels[256:SMALLEST]) == CONTROLS
    assert engine.extend(0, [299], 1).shape == (1, 300)


def test_it_says_what_its_template_has_it_say_and_then_ends() -> None:
    engine = ToyEngine()
    said = b'<tool_call>{"a": 1}'
    start = [*b"Hi", SAY, *said, ASSISTANT]
    answer = list(itertools.islice(alone(engine, start, Sampling(temperature=0.0)), 100))
    assert bytes(answer[:-1]) == said
    assert answer[-1] == END


@pytest.mark.parametrize(
    "start",
    [
        [SAY, *b"abc", END, *b"def", ASSISTANT],  # something else came in between
        [SAY, *b"abc", ASSISTANT, *b"ax"],  # it said something else
        [SAY, *b"a" * (MOST_SAID + 1), ASSISTANT],
    ],
    ids=["not-at-once", "not-followed", "too-much"],
)
def test_it_goes_on_with_words_where_it_does_not_say_it(start: list[int]) -> None:
    engine = ToyEngine(ToySettings(context=8192, chunk=8192))
    row = engine.extend(0, start, 1)[0]
    assert int(row.argmax()) in {word[0] for word in WORDS} | {SPACE}
