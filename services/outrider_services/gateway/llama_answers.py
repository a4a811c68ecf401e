"""llama.cpp's own answers, and what it tells of a server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import outrider
from outrider.core.stats import Report
from outrider.core.values import Fragment, Token, TopLogprob
from outrider_services.gateway.asking import Answer
from outrider_services.gateway.figures import provenance, timings
from outrider_services.gateway.sse import dump, event


class NativeForm:
    """How an answer is told at /completion and /infill."""

    def __init__(
        self, answer: Answer, model: str, fields: Sequence[str] | None, *, provenance: bool
    ) -> None:
        self.answer, self.model = answer, model
        self._fields, self._provenance = fields, provenance
        self._spans = self._count = 0  # that were told: of the trace, and tokens

    def start(self) -> bytes:
        return b""

    def part(self, fragment: Fragment) -> bytes:
        if self.answer.ask.reads_only:
            return b""
        self._count += len(fragment.tokens)
        found: dict[str, Any] = {
            "index": 0,
            "content": fragment.text,
            "tokens": [token.id for token in fragment.tokens],
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": self._count,
            "tokens_evaluated": len(self.answer.stream.prompt_token_ids),
        }
        if known := probabilities([fragment]):
            found["completion_probabilities"] = known
        if self._provenance:
            found["outrider"] = self._told(fragment)
        return event(dump(found))

    def end(self) -> bytes:
        return event(dump(self._last("")))

    def whole(self) -> dict[str, Any]:
        if self.answer.ask.reads_only:
            return self._last("")
        known = probabilities(self.answer.stream.fragments)
        more = {"completion_probabilities": known} if known else {}
        return self._last(self.answer.text, more)

    def _told(self, fragment: Fragment | None) -> dict[str, Any]:
        spans = self.answer.stream.spans
        new, self._spans = spans[self._spans :], len(spans)
        return provenance(fragment, new, self.answer.stream.stats)

    def _last(self, content: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        answer, report = self.answer, self._report()
        prompt = len(answer.stream.prompt_token_ids)
        count = 0 if answer.ask.reads_only else report.generated_tokens
        kind, word = ending(answer)
        figures: dict[str, Any] = {"stats": report.as_dict()}
        if self._provenance:
            figures = self._told(None)
        found = {
            "index": 0,
            "content": content,
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": self.model,
            "tokens_predicted": count,
            "tokens_evaluated": prompt,
            "generation_settings": asked(answer.ask.settings, report),
            "has_new_line": "\n" in answer.text,
            "truncated": False,
            "stop_type": kind,
            "stopping_word": word,
            "tokens_cached": report.cached_tokens,
            "timings": timings(report, prompt),
            "outrider": figures,
            **(more or {}),
        }
        return found if self._fields is None else chosen(found, self._fields)

    def _report(self) -> Report:
        assert self.answer.stream.stats  # it has ended
        return self.answer.stream.stats


def probabilities(fragments: Sequence[Fragment]) -> list[dict[str, Any]]:
    """llama.cpp's list of tokens and of the likeliest ones in their places, if it was asked for."""

    def told(token: Token | TopLogprob, logprob: float | None) -> dict[str, Any]:
        piece = token.piece
        return {"id": token.id, "token": token.text, "bytes": list(piece), "logprob": logprob}

    return [
        {
            **told(token, token.logprob),
            "top_logprobs": [told(one, one.logprob) for one in token.top_logprobs],
        }
        for fragment in fragments
        for token in fragment.tokens
        if token.logprob is not None and token.piece
    ]


def asked(settings: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The settings that were given, under llama.cpp's names, and the seed that was used."""
    found = {name: value for name, value in settings.items() if value is not None}
    found["n_predict"] = found.pop("max_tokens", -1)
    return {**found, "seed": report.seed}


def ending(answer: Answer) -> tuple[str, str]:
    """Why it ended, in llama.cpp's words, and the stop string if that was the reason."""
    match answer.stream.finish_reason:
        case "cancelled" if not answer.is_late:
            return "none", ""
        case "stop":
            return stopped(answer)
    return "limit", ""


def stopped(answer: Answer) -> tuple[str, str]:
    """Whether an end token or a stop string ended it; the tokens go on behind the string."""
    fragments = answer.stream.fragments
    pieces = b"".join(token.piece for one in fragments for token in one.tokens)
    behind = pieces.decode("utf-8", "replace")[len(answer.text) :]
    stops = answer.ask.settings.get("stop") or ()
    words = [stops] if isinstance(stops, str) else stops
    found = [word for word in words if word and behind.startswith(word)]
    return ("word", max(found, key=len)) if found else ("eos", "")


def chosen(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Only these fields, each under the name by which it was asked for; others are left out."""
    result = {}
    for name in names:
        value: Any = found
        for key in re.split(r"[./]", name):
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            result[name] = value
    return result


# ---- the server ---------------------------------------------------------------------------------


def props(target: Mapping[str, Any], model: str) -> dict[str, Any]:
    """/props: those of llama-server's fields that apply."""
    return {
        "default_generation_settings": {"n_ctx": target["context"], "params": {}},
        "total_slots": target["slots"],
        "model_alias": model,
        "modalities": {"vision": False, "audio": False},
        "build_info": f"outrider {outrider.__version__}",
    }


def slots(
    workers: Mapping[str, Mapping[str, Any]], running: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """/slots: the running requests by their numbers, and the places that are free.

    Which sequence a request has is not known outside: the first have the first.
    """
    speculative = any(worker["role"] == "draft" for worker in workers.values())
    found: list[dict[str, Any]] = []
    for name, target in workers.items():
        if target["role"] != "target":
            continue
        own = [item for item in running.items() if item[1].get("target") == name]
        for number in range(target["slots"]):
            slot = {"id": len(found), "n_ctx": target["context"], "speculative": speculative}
            found.append({**slot, "is_processing": False})
            if number < len(own):
                task, told = own[number]
                decoded = {"n_decoded": told.get("generated_tokens", 0)}
                at_work = {"is_processing": True, "id_task": int(task), "next_token": decoded}
                found[-1].update(at_work, outrider=told)
    return found
