"""What both interfaces' requests have in common: their numbers' bounds, and what is not offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from outrider.client import CompletionSettings
from outrider.client.settings import LONGEST_STOP, MOST_STOPS
from outrider.core.sampling import BIASES, BREAKERS
from outrider.core.values import MOST_TOKENS
from outrider.errors import BadRequest

MOST = (1 << 31) - 1
NEVER = -1e6  # the bias of a token that is not to be chosen: `false` in llama.cpp's form


Flag: TypeAlias = Annotated[bool, Field(strict=True)]
Length: TypeAlias = Annotated[int, Field(strict=True, ge=-1, le=MOST)]  # -1: until the context
Id: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Ids: TypeAlias = Annotated[list[Id], Field(max_length=MOST_TOKENS)]
Bias: TypeAlias = Annotated[float, Field(strict=True, ge=-1e6, le=1e6, allow_inf_nan=False)]
Stop: TypeAlias = Annotated[str, Field(max_length=LONGEST_STOP)]
Stops: TypeAlias = Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)]
Biases: TypeAlias = (
    Annotated[dict[str, Bias], Field(max_length=BIASES)]
    | Annotated[list[tuple[Id, Bias | Literal[False]]], Field(max_length=BIASES)]
)
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MOST)]
LastN: TypeAlias = Annotated[int, Field(strict=True, ge=-1, le=MOST)]
Share: TypeAlias = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Penalty: TypeAlias = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]
Sigma: TypeAlias = Annotated[float, Field(strict=True, ge=-1, le=1000, allow_inf_nan=False)]
DryBase: TypeAlias = Annotated[float, Field(strict=True, ge=1, le=100, allow_inf_nan=False)]
DryLength: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=1024)]
Breakers: TypeAlias = Annotated[list[str], Field(max_length=BREAKERS)]
Samplers: TypeAlias = Annotated[list[str] | str, Field(max_length=64)]
Repeat: TypeAlias = Annotated[float, Field(strict=True, ge=0.01, le=100, allow_inf_nan=False)]
Heat: TypeAlias = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
Seed: TypeAlias = Annotated[int, Field(strict=True, ge=-(1 << 63), le=(1 << 63) - 1)]
Milliseconds: TypeAlias = Annotated[float, Field(strict=True, ge=-1, le=1e9, allow_inf_nan=False)]

# what other services know and this one does not, with the values that change nothing there
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "n_cmpl": (1,),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "mirostat": (0,),
    "adaptive_target": (-1,),
    "lora": ([],),
    "min_keep": (0,),
    "n_keep": (0, -1),
    "post_sampling_probs": (False,),
    "return_tokens": (False,),
    "return_progress": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": ("",),
    "chat_template_kwargs": ({},),
}


class Asked(BaseModel):
    """A request's body. What has no field here is ignored, unless it is in `NEUTRAL`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def ignored(self) -> list[str]:
        """The fields that change nothing. Raises BadRequest for what is known and not offered."""
        more: Mapping[str, object] = self.model_extra or {}
        for name, value in more.items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise BadRequest(f"{name} is not supported", name)
        return [name for name in more if name not in NEUTRAL]


class LlamaSamplers(BaseModel):
    """The less common samplers, by llama-server's names; the library has the same."""

    typical_p: Share | None = None
    top_n_sigma: Sigma | None = None
    dynatemp_range: Heat | None = None
    dynatemp_exponent: Heat | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    dry_multiplier: Heat | None = None
    dry_base: DryBase | None = None
    dry_allowed_length: DryLength | None = None
    dry_penalty_last_n: LastN | None = None
    dry_sequence_breakers: Breakers | None = None
    samplers: Samplers | None = None


class Sampled(Asked, LlamaSamplers):
    """A request for an answer, with the settings that have one name everywhere."""

    model: Annotated[str, Field(max_length=256)] | None = None
    stream: Flag | None = None
    temperature: Heat | None = None
    top_k: LastN | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repeat_penalty: Repeat | None = None
    repeat_last_n: LastN | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    ignore_eos: Flag | None = None
    cache_prompt: Flag | None = None
    return_provenance: Flag | None = None
    speculative: Flag | None = Field(None, alias="speculative.enabled")
    n_draft: Count | None = Field(None, alias="speculative.n_max")
    n_min: Count | None = Field(None, alias="speculative.n_min")
    p_min: Share | None = Field(None, alias="speculative.p_min")

    def settings(
        self,
        most: int | None,
        form: Mapping[str, Any],
        *,
        logprobs: bool = False,
        tops: int | None = None,
    ) -> CompletionSettings:
        """As the client library takes them; `most` tokens, None or -1: until the context is full.

        `form` are those that say what the answer has to be. A setting that the library has, too,
        needs a field above and here a line, unless it is one of `LlamaSamplers`.
        """
        samplers = {name: getattr(self, name) for name in LlamaSamplers.model_fields}
        named: Any = {**samplers, **form}
        found: CompletionSettings = CompletionSettings(
            **named,  # type: ignore[typeddict-item]  # by the same names
            max_tokens=None if most == -1 else most,
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),  # -1 is off there, too
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=self.repeat_last_n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=biases(self.logit_bias),
            seed=self.seed,
            stop=self.stop,
            logprobs=logprobs,
            top_logprobs=tops,
            ignore_eos=self.ignore_eos,
            cache_prompt=self.cache_prompt,
            mode="plain" if self.speculative is False else None,
            n_draft=self.n_draft,
            n_min=self.n_min,
            p_min=self.p_min,
            trace=self.return_provenance,
        )
        return found


def biases(
    given: dict[str, float] | list[tuple[int, float | Literal[False]]] | None,
) -> dict[str, float] | None:
    """As the library takes them, from either form."""
    if isinstance(given, list):
        return {str(token): NEVER if bias is False else bias for token, bias in given}
    return given


def length(name: str, value: int | None) -> int | None:
    """How many tokens are asked for. Raises BadRequest for none."""
    if value == 0:
        raise BadRequest(f"{name} must be at least 1, or -1 for no limit", name)
    return value
