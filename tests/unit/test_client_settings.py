"""What the client accepts of a user, and what it refuses, before anything is sent."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, get_type_hints

import numpy as np
import pytest

import outrider
from outrider import BadRequest, CompletionSettings
from outrider.client import samplers, settings
from outrider.client.chat import conversation
from outrider.client.settings import files, prompt_of, submit, token_ids
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
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", 1.5),
        ("logprobs", "yes"),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("top_logprobs", True),
        ("top_logprobs", 1.5),
        ("typical_p", "x"),
        ("typical_p", 1.1),
        ("top_n_sigma", -2),
        ("top_n_sigma", float("nan")),
        ("dynatemp_range", -1),
        ("dynatemp_exponent", [1]),
        ("xtc_probability", 1.1),
        ("xtc_threshold", -1),
        ("dry_multiplier", -1),
        ("dry_base", 0.9),
        ("dry_allowed_length", 1.5),
        ("dry_allowed_length", 1025),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", "x"),
        ("dry_sequence_breakers", 5),
        ("dry_sequence_breakers", ["x", 5]),
        ("dry_sequence_breakers", ["\ud800"]),
        ("dry_sequence_breakers", ["x" * 41]),
        ("samplers", 5),
        ("samplers", {"top_k": 1}),
        ("samplers", ["top_k", 5]),
        ("samplers", ["top_k", "penalties"]),
        ("samplers", ["top_k", "top_k"]),
        ("samplers", "kk"),
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


def test_more_breakers_than_a_request_may_have_are_refused() -> None:
    with pytest.raises(BadRequest, match="dry_sequence_breakers has 17 texts") as caught:
        asked(dry_sequence_breakers=["x"] * 17)
    assert caught.value.param == "dry_sequence_breakers"


EVERYTHING: dict[str, Any] = {
    "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8,
    "top_n_sigma": 2.0, "dynatemp_range": 0.3, "dynatemp_exponent": 2.0, "xtc_probability": 0.5,
    "xtc_threshold": 0.2, "repeat_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2,
    "dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3, "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\n", "né"], "seed": 5,
}  # fmt: skip


def test_every_sampler_by_llama_servers_name() -> None:
    sampling = asked(**EVERYTHING).sampling
    for name, value in EVERYTHING.items():
        assert getattr(sampling, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("given", "off"),
    [
        (list(samplers.OFF), {}),
        ("edskypmxt", {}),
        (["Penalties", "DRY", "top-n-sigma", "topk", "typ", "nucleus", "min_p", "xtc", "temp"], {}),
        (np.array(["top_k", "temperature"]),
         {"repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0,
          "top_n_sigma": -1, "typical_p": 1, "top_p": 1, "min_p": 0, "xtc_probability": 0}),
        ("edskypmx", {"temperature": 1, "dynatemp_range": 0}),
        (["penalties", "dry", "top_n_sigma", "top_k", "top_p", "xtc", "temperature"],
         {"typical_p": 1, "min_p": 0}),
    ],
    ids=["all", "letters", "other-names", "an-array", "no-temperature", "a-part"],
)  # fmt: skip
def test_a_sampler_that_is_not_on_the_list_is_off(given: Any, off: dict[str, float]) -> None:
    every = asked(**EVERYTHING).sampling
    assert asked(**EVERYTHING, samplers=given).sampling == every.changed(**off)


def test_without_any_sampler_only_the_bias_is_left() -> None:
    nothing: Any
    for nothing in ([], ""):
        sampling = asked(**EVERYTHING, samplers=nothing, logit_bias={5: 1}).sampling
        left = {"dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"}
        left |= {"xtc_threshold", "dynatemp_exponent", "seed"}
        given = {name: getattr(sampling, name) for name in left}
        bare = Sampling(temperature=1.0, logit_bias=((5, 1.0),), **given)
        assert sampling == bare


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["top_k", "infill"], "'infill', which is not supported; there are penalties, dry, top_n"),
        (["mirostat"], "'mirostat', which is not supported"),
        (["tempature"], "did you mean 'temperature'"),
        ("kz", "'z', which is not supported"),
        (["temperature", "top_k"], "must be in this order, each once: penalties, dry, top_n_sigma"),
    ],
    ids=["infill", "mirostat", "misspelt", "a-letter", "another-order"],
)
def test_samplers_that_are_not_supported_are_refused(given: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        asked(samplers=given)
    assert caught.value.param == "samplers"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (False, 0)),
        ({"logprobs": False}, (False, 0)),
        ({"logprobs": True}, (True, 0)),
        ({"logprobs": True, "top_logprobs": 0}, (True, 0)),
        ({"logprobs": True, "top_logprobs": np.int64(20)}, (True, 20)),
        ({"logprobs": 0}, (True, 0)),
        ({"logprobs": np.int32(5)}, (True, 5)),
        ({"logprobs": 5, "top_logprobs": 5}, (True, 5)),
    ],
    ids=str,
)
def test_logprobs_are_asked_for_in_both_of_openais_ways(
    given: dict[str, Any], expected: tuple[bool, int]
) -> None:
    request = asked(**given)
    assert (request.logprobs, request.top_logprobs) == expected


@pytest.mark.parametrize(
    "given", [{"top_logprobs": 3}, {"logprobs": False, "top_logprobs": 1},
              {"logprobs": 2, "top_logprobs": 3}], ids=str,
)  # fmt: skip
def test_top_logprobs_need_logprobs(given: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="top_logprobs") as caught:
        asked(**given)
    assert caught.value.param == "top_logprobs"


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


@pytest.mark.parametrize("extra", [None, "ab", [1], [("a",)], [("a", 1)], [("a", "\ud800")], {}])
def test_files_are_pairs_of_name_and_text(extra: Any) -> None:
    assert files("extra", [("a", "b"), ["c", "d"]]) == (("a", "b"), ("c", "d"))
    with pytest.raises(BadRequest, match="extra") as caught:
        files("extra", extra)
    assert caught.value.param == "extra"


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
