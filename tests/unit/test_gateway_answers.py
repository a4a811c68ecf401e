"""How an answer is told, from fragments made here: without sockets."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import pytest

from outrider.client import CompletionSettings, Stream
from outrider.core.stats import Report, Stats
from outrider.core.values import (
    Drafted,
    Fragment,
    Kind,
    Span,
    Token,
    ToolCallDelta,
    TopLogprob,
)
from outrider_services.gateway.asking import Answer, Ask
from outrider_services.gateway.figures import timings
from outrider_services.gateway.llama_answers import NativeForm, chosen
from outrider_services.gateway.openai_answers import ChatForm, CompletionForm

REPORT: Report = (
    Stats()
    .report()
    .changed(
        generated_tokens=3,
        verified_tokens=2,
        accepted_tokens=1,
        prefill_s=0.5,
        decode_s=2.0,
        seed=7,
        cached_tokens=1,
    )
)
SPAN = Span("target", 1.0, 2.0, 3, 4, 5, (6,))


def token(piece: bytes, kind: Kind = "drafted", logprob: float | None = None) -> Token:
    return Token(piece[0] if piece else 256, piece, 0, kind, 1.0, logprob)


def told_of(
    *fragments: Fragment, reason: str = "stop", ask: Ask | None = None, text: str | None = None
) -> Answer:
    """An answer that has ended."""
    made: Any = object.__new__(Stream)
    made.fragments, made.stats, made.finish_reason = list(fragments), REPORT, reason
    made.prompt_token_ids, made.spans, made.trace = (1, 2), [SPAN], None
    made._error = None
    text = "".join(one.text for one in fragments) if text is None else text
    return Answer("a", ask or Ask(), cast(Stream, made), created=9, text=text)


def fragment(text: str, *tokens: Token) -> Fragment:
    return Fragment(1, text, tokens, (Drafted(1, 0.5),))


def data(events: bytes) -> list[Any]:
    """The objects in some events."""
    lines = [line for line in events.decode().split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


HELLO = fragment('a "\né', token(b"a"), token(b"b", "bonus"))


@pytest.mark.parametrize("usage", [False, True])
def test_the_quick_form_of_a_chunk_equals_the_other(usage: bool) -> None:
    """Text alone is put together from text; with provenance the chunk is made as a whole."""
    for form in (ChatForm, CompletionForm):
        quick = form(told_of(HELLO), "m", usage=usage, provenance=False)
        whole = form(told_of(HELLO), "m", usage=usage, provenance=True)
        (one,), (other,) = data(quick.part(HELLO)), data(whole.part(HELLO))
        assert other.pop("outrider")["tokens"] == [
            {"text": "a", "kind": "drafted"},
            {"text": "b", "kind": "bonus"},
        ]
        assert one == other
        assert ("usage" in one) == usage


def test_a_fragment_without_text_is_told_only_if_it_says_something() -> None:
    silent = fragment("", token(b"\xc3"))
    form = ChatForm(told_of(silent), "m", usage=False, provenance=False)
    assert form.part(silent) == b""
    (sure,) = data(form.part(fragment("", token(b"\xc3", logprob=-0.5))))
    (known,) = sure["choices"][0]["logprobs"]["content"]
    assert (known["bytes"], known["logprob"], known["token"]) == ([0xC3], -0.5, "\ufffd")


def test_spans_are_told_once() -> None:
    answer = told_of(HELLO)
    form = ChatForm(answer, "m", usage=True, provenance=True)
    (first,), (second,) = data(form.part(HELLO)), data(form.part(HELLO))
    assert first["outrider"]["spans"] == [
        {"lane": "target", "start": 1.0, "end": 2.0, "rows": 3, "number": 4, "base": 5}
    ]
    assert second["outrider"]["spans"] == []
    finish, usage = data(form.end())
    assert finish["outrider"]["stats"]["seed"] == 7
    assert usage["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_an_end_token_has_no_logprob_to_tell() -> None:
    last = fragment("a", token(b"a", logprob=-1.0), token(b"", logprob=-2.0))
    choice = CompletionForm(told_of(last), "m", usage=False, provenance=False).whole()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["a"],
        "token_logprobs": [-1.0],
        "top_logprobs": None,
        "text_offset": [0],
    }


def test_calls_are_told_by_their_pieces_each_once_in_a_chunk() -> None:
    deltas = (
        ToolCallDelta(0, arguments="1}"),
        ToolCallDelta(1, "c2", "g"),
        ToolCallDelta(1, arguments="{"),
        ToolCallDelta(1, arguments="}"),
    )
    first = Fragment(1, "", (), (), (ToolCallDelta(0, "c1", "f"), ToolCallDelta(0, arguments="{")))
    then = Fragment(2, "so", (), (), deltas)
    answer = told_of(first, then, reason="tool_calls")
    form = ChatForm(answer, "m", usage=False, provenance=False)
    (one,), (two,) = data(form.part(first)), data(form.part(then))
    opened = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    assert one["choices"][0]["delta"] == {"tool_calls": [{"index": 0, **opened}]}
    second = {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert two["choices"][0]["delta"] == {
        "content": "so",
        "tool_calls": [{"index": 0, "function": {"arguments": "1}"}}, {"index": 1, **second}],
    }
    whole = form.whole()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    whole_first = {**opened, "function": {"name": "f", "arguments": "{1}"}}
    assert whole["message"]["tool_calls"] == [whole_first, second]
    assert whole["message"]["content"] == "so"
    (silent,) = ChatForm(told_of(first), "m", usage=False, provenance=False).whole()["choices"]
    assert silent["message"]["content"] is None


def test_the_likeliest_tokens_are_told_in_each_interfaces_way() -> None:
    tops = (TopLogprob(97, b"a", -0.5), TopLogprob(195, b"\xc3", -1.5))
    one = fragment("a", Token(97, b"a", 0, "plain", 1.0, -0.5, tops))
    chat = ChatForm(told_of(one), "m", usage=False, provenance=False).whole()["choices"][0]
    told = [
        {"token": "a", "logprob": -0.5, "bytes": [97]},
        {"token": "\ufffd", "logprob": -1.5, "bytes": [0xC3]},
    ]
    assert chat["logprobs"]["content"] == [{**told[0], "top_logprobs": told}]
    text = CompletionForm(told_of(one), "m", usage=False, provenance=False).whole()["choices"][0]
    assert text["logprobs"]["top_logprobs"] == [{"a": -0.5, "\ufffd": -1.5}]
    form = NativeForm(told_of(one), "m", None, provenance=False)
    (part,) = data(form.part(one))
    with_ids = [{**told[0], "id": 97}, {**told[1], "id": 195}]
    assert part["completion_probabilities"] == [{**with_ids[0], "top_logprobs": with_ids}]
    assert form.whole()["completion_probabilities"] == part["completion_probabilities"]
    assert (
        "completion_probabilities"
        not in NativeForm(told_of(HELLO), "m", None, provenance=False).whole()
    )


@pytest.mark.parametrize(
    ("text", "tokens", "stop", "ending"),
    [
        ("ab", (b"a", b"b", b""), ["x"], ("eos", "")),
        ("ab", (b"a", b"bx"), ["x"], ("word", "x")),
        ("ab", (b"a", b"bxy"), ["x", "xy"], ("word", "xy")),
        ("a", (b"a", b"bx"), "bx", ("word", "bx")),
        ("é", ("é".encode()[:1], "é".encode()[1:], b"x"), ["x"], ("word", "x")),
    ],
)
def test_a_stop_string_is_told_from_an_end_token(
    text: str, tokens: tuple[bytes, ...], stop: Any, ending: tuple[str, str]
) -> None:
    ask = Ask(settings=CompletionSettings(stop=stop))
    answer = told_of(fragment(text, *map(token, tokens)), ask=ask)
    last = NativeForm(answer, "m", None, provenance=False).whole()
    assert (last["stop_type"], last["stopping_word"]) == ending


def test_an_answer_cut_by_its_time_has_reached_a_limit() -> None:
    answer = told_of(HELLO, reason="cancelled")
    assert NativeForm(answer, "m", None, provenance=False).whole()["stop_type"] == "none"
    answer.is_late = True
    assert NativeForm(answer, "m", None, provenance=False).whole()["stop_type"] == "limit"


def test_what_was_only_read_has_no_text() -> None:
    answer = told_of(HELLO, reason="length", ask=Ask(reads_only=True))
    form = NativeForm(answer, "m", None, provenance=False)
    assert form.part(HELLO) == b""
    assert (form.whole()["content"], form.whole()["tokens_predicted"]) == ("", 0)


def test_timings_count_and_divide() -> None:
    found = timings(REPORT, 10)
    assert (found["cache_n"], found["prompt_n"], found["prompt_ms"]) == (1, 9, 500)
    assert found["prompt_per_token_ms"] == pytest.approx(500 / 9)
    assert (found["predicted_n"], found["predicted_per_second"]) == (3, 1.5)
    assert (found["draft_n"], found["draft_n_accepted"]) == (2, 1)
    alone = timings(Stats().report(), 10)
    assert "draft_n" not in alone
    assert alone["predicted_per_second"] == 0


def test_chosen_fields_may_lie_deep() -> None:
    found = {"a": {"b": {"c": 1}}, "d": None}
    assert chosen(found, ["a/b.c", "d", "a/x", "d/e"]) == {"a/b.c": 1, "d": None}


async def test_the_time_for_an_answer_counts_from_its_first_fragment() -> None:
    class Endless:
        """Lines without end, until it is cancelled."""

        cancelled = False

        def __aiter__(self) -> Endless:
            return self

        async def __anext__(self) -> Fragment:
            if self.cancelled:
                raise StopAsyncIteration
            return fragment("x\n", token(b"x"))

        async def cancel(self) -> None:
            self.cancelled = True

    made = Endless()
    answer = Answer("a", replace(Ask(), predict_ms=5.0), cast(Stream, made))
    told = [one async for one in answer.fragments(0.0, 5.0)]
    assert answer.is_late
    assert made.cancelled
    assert answer.text == "x\n" * len(told)
