"""What the client accepts of a user, and what it refuses, before anything is sent."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, get_type_hints

import numpy as np
import pytest

import outrider
from outrider import BadRequest, CompletionSettings
from outrider.client import settings
from outrider.client.chat import conversation
from outrider.client.settings import prompt_of, submit, token_ids
from outrider.core.sampling import Sampling
from outrider.wire.codec import check
from outrider.wire.messages import Submit


def asked(**given: Any) -> Submit:
    request = submit(1, prompt_of(given.pop("prompt", "Hello")), None, given)
    check(request)
    return request


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


TEXT = {"type": "text", "text": "Hello"}


class Dumped:
    """As an answer of OpenAI's library is, which people put into the next question."""

    def model_dump(self, *, exclude_none: bool) -> dict[str, object]:
        found = {"role": "assistant", "content": "Ho", "refusal": None, "tool_calls": None}
        return {k: v for k, v in found.items() if not (exclude_none and v is None)}


@pytest.mark.parametrize(
    "prompt",
    [
        [72, 105],
        (72, 105),
        np.array([72, 105]),
        np.array([72, 105], np.uint8),
        [np.int64(72), np.uint16(105)],
        range(72, 139, 33),
        iter([72, 105]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_ids_come_from_any_sequence_or_array(prompt: Any) -> None:
    found = prompt_of(prompt)
    assert found[:2] == (72, 105) or found == (72, 105, 138)
    assert {type(one) for one in found} == {int}


def test_text_is_passed_on_as_plain_text() -> None:
    assert type(prompt_of(np.str_("Hello"))) is str
    assert asked(stop=np.str_("x")).stop == ("x",)
    assert asked(stop=["x", "", "y"]).stop == ("x", "y")


def test_numbers_may_be_those_of_numpy() -> None:
    request = asked(
        max_tokens=np.int64(5),
        seed=np.uint32(7),
        temperature=np.float32(0.5),
        top_p=1,
        min_p=Fraction(1, 4),
        n_draft=np.int8(3),
        logprobs=np.True_,
        logit_bias={np.int64(9): np.float32(-1), 3: 2, "5": 1},
    )
    assert request.n_predict == 5
    assert request.n_draft == 3
    assert request.logprobs is True
    sampling = request.sampling
    assert (sampling.seed, sampling.temperature, sampling.min_p) == (7, 0.5, 0.25)
    assert sampling.logit_bias == ((3, 2.0), (5, 1.0), (9, -1.0))


def test_none_is_the_default_of_every_setting() -> None:
    default, nothing = asked(seed=1), asked(**dict.fromkeys(settings.CHECKS) | {"seed": 1})
    assert nothing == default
    assert default.sampling == Sampling(seed=1)
    assert (default.n_predict, default.mode, default.n_draft) == (None, None, None)
    assert default.stop == ()


@pytest.mark.parametrize("seed", [{}, {"seed": None}, {"seed": -1}], ids=["none", "None", "-1"])
def test_a_seed_that_is_not_given_is_drawn(seed: dict[str, Any]) -> None:
    assert len({asked(**seed).sampling.seed for _ in range(4)}) > 1


def test_every_keyword_is_checked_and_documented() -> None:
    assert get_type_hints(CompletionSettings).keys() == settings.CHECKS.keys()
    assert set(Sampling.__struct_fields__) <= settings.CHECKS.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("prompt", b"Hello"),
        ("prompt", bytearray(b"Hello")),
        ("prompt", {1: 2}),
        ("prompt", {1, 2}),
        ("prompt", 5),
        ("prompt", object()),
        ("prompt", ["Hello"]),
        ("prompt", [1, True]),
        ("prompt", [1, None]),
        ("prompt", [1.0]),
        ("prompt", [2**31]),
        ("prompt", [10**400]),
        ("prompt", np.array([1.0])),
        ("prompt", np.array([True])),
        ("prompt", np.zeros((2, 2), int)),
        ("prompt", np.array(5)),
        ("prompt", "\ud800"),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 2**62),
        ("max_tokens", 10**5000),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", 10**5000),
        ("temperature", 1j),
        ("top_k", 1.0),
        ("seed", "1"),
        ("seed", 2**63),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", ["x", 5]),
        ("stop", {"x": 1}),
        ("stop", "\ud800"),
        ("logit_bias", [1]),
        ("logit_bias", {"one": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {1.5: 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", {1: None}),
        ("logit_bias", {1: float("nan")}),
        ("logprobs", 5),
        ("ignore_eos", "yes"),
        ("trace", 1),
        ("stop", "x" * 257),
        ("mode", 5),
        ("mode", "fast"),
        ("n_draft", -1),
        ("n_min", 0.5),
        ("p_min", 2),
        ("p_min", float("nan")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, int) else f"{value!s:.20}",
)
def test_what_is_wrong_is_one_error_that_names_the_argument(name: str, value: Any) -> None:
    with pytest.raises(
        BadRequest, match=f"{name}.* (must be|is not as it should be|is out of)"
    ) as no:
        asked(**{name: value})
    assert no.value.param == name


def test_more_stops_than_a_request_may_have_are_counted() -> None:
    with pytest.raises(BadRequest, match="stop has 17 texts, more than 16") as caught:
        asked(stop=["x"] * 17)
    assert caught.value.param == "stop"


@pytest.mark.parametrize("value", [float("nan"), -1.0, "5", None])
def test_a_time_to_wait_is_a_number_of_seconds(value: Any) -> None:
    with pytest.raises(BadRequest, match=r"timeout_s must be a number") as caught:
        outrider.Client("nobody", timeout_s=value)
    assert caught.value.param == "timeout_s"


def test_an_unknown_keyword_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(BadRequest, match="'temprature'; did you mean 'temperature'") as caught:
        asked(temprature=1)
    assert caught.value.param == "temprature"
    with pytest.raises(BadRequest, match=r"there is no setting 'zzz'$"):
        asked(zzz=None)


@pytest.mark.parametrize("tokens", ["Hi", b"Hi", None, 5, {1: 2}, [None], [0.5]], ids=repr)
def test_only_ids_can_be_detokenized(tokens: Any) -> None:
    with pytest.raises(BadRequest, match=r"tokens.* must be"):
        token_ids("tokens", tokens)


@pytest.mark.parametrize(
    ("messages", "pairs"),
    [
        (user("Hello"), (("user", "Hello"),)),
        (user([TEXT, TEXT]), (("user", "HelloHello"),)),
        (iter(user((TEXT,))), (("user", "Hello"),)),
        ([*user("Hi"), {"role": "assistant", "content": "Ho", "tool_calls": None}],
         (("user", "Hi"), ("assistant", "Ho"))),
        ([{"role": "user", "name": "Ada", "content": "Hi"}], (("user", "Hi"),)),
        ([Dumped()], (("assistant", "Ho"),)),
    ],
    ids=["text", "parts", "iterables", "fields-of-none", "a-name", "an-object"],
)  # fmt: skip
def test_a_message_has_text_or_parts(messages: Any, pairs: tuple[tuple[str, str], ...]) -> None:
    assert [(turn.role, turn.content) for turn in conversation(messages)] == list(pairs)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages must be"),
        ("Hello", "messages must be"),
        (user("Hello")[0], "messages must be"),
        (["Hello"], r"messages\[0\] must be"),
        ([{"content": "Hello"}], r"messages\[0\] has no 'role'"),
        ([*user("Hello"), {"role": "user"}], r"messages\[1\] has no 'content'"),
        ([{"role": 5, "content": "Hello"}], r"messages\[0\].role must be"),
        ([{"role": "us<|end|>er", "content": "Hello"}], r"messages\[0\].role must be one of sys"),
        ([*user("Hi"), {"role": "wizard", "content": "Hello"}], r"messages\[1\].role must be one"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "for the role 'assistant'"),
        ([{"role": "user", "content": "x", "audio": {}}], "unknown field 'audio'"),
        (user(None), r"messages\[0\].content must be"),
        (user(5), r"messages\[0\].content must be"),
        (user(TEXT), r"messages\[0\].content must be"),
        (user("\ud800"), r"messages\[0\].content must be"),
        (user(["Hello"]), r"messages\[0\].content\[0\] must be"),
        (user([{"text": "x"}]), "has no 'type'"),
        (user([{"type": "text"}]), "has no 'text'"),
        (user([{"type": "text", "text": 5}]), r"content\[0\].text must be"),
        (user([TEXT, {"type": "image_url", "image_url": {}}]), r"content\[1\].type must be 'text'"),
    ],
    ids=lambda value: f"{value!s:.40}",
)
def test_a_message_that_is_wrong_is_one_error_that_says_where(messages: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        conversation(messages)
    assert caught.value.param == "messages"
