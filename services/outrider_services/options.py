"""Every setting once: its key, spellings, type, default and help.

The flags of the command line, the variables of the environment (`OUTRIDER_SECTION__KEY`), the keys
of the configuration file and the flags of the processes that we start all come from this table.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from outrider.errors import ConfigError

Mode = Literal["plain", "sync", "pipelined", "auto"]
Backend = Literal["llama", "toy"]
Place = Literal["spawn", "remote"]
Compat = Literal["none", "vllm"]
Quant = Literal["auto", "off", "q4_0", "q4_1", "q8_0"]
KERNELS = ("tiled", "repack", "flash")
QUANTS: tuple[str, ...] = get_args(Quant)[2:]
SEEDS = 1 << 63  # seeds are below; one below 0 means a random one


def opt(default: Any, flags: str, help: str, metavar: str | None = None) -> Any:
    """A row of the table; `flags` are its spellings, of which the first with two dashes names it.

    One without flags is a secret: other users can read a command line.
    """
    metadata = {"flags": flags.split(), "help": help, "metavar": metavar}
    if isinstance(default, list | dict):
        raise TypeError("a default must not change: use a tuple")
    return field(default=default, metadata=metadata, repr=bool(flags))


# fmt: off
@dataclass(frozen=True, slots=True)
class TargetOptions:
    model: str | None = opt(None, "-m --model -model", "target model: a GGUF file or hf://user/repo[:quant]", "FILE")
    hf: str | None = opt(None, "-hf --hf-repo", "target model from the hub", "USER/REPO[:QUANT]")
    threads: int = opt(4, "-t --threads -threads", "threads of the target worker (fewer if it has fewer cores)", "N")
    ctx: int = opt(2048, "-c --ctx-size -ctx --ctx", "context of each request, in tokens", "N")
    cores: str = opt("", "--target-cores -Cr", "cores the target worker may use, such as 0,2-3", "LIST")
    without: str = opt("auto", "--without-kernels", "llama.cpp's kernels that the target does without, of tiled,repack,flash; none: it uses all; auto: as tuning found", "LIST")
    ngl: int = opt(0, "-ngl --n-gpu-layers --gpu-layers", "layers of the target on the GPU; -1: all", "N")
    place: Place = opt("spawn", "--target-place", "spawn the target worker here, or wait for a remote one")


@dataclass(frozen=True, slots=True)
class DraftOptions:
    model: str | None = opt(None, "-md --model-draft -draft-model --draft-model --spec-draft-model", "draft model", "FILE")
    hf: str | None = opt(None, "-hfd --hf-repo-draft --spec-draft-hf", "draft model from the hub", "USER/REPO[:QUANT]")
    quant: Quant = opt("auto", "--draft-quant", "re-quantise the draft: the type that `outrider tune` found (found at once for the default pair), none, or this")
    n_max: int | None = opt(None, "--spec-draft-n-max -n-draft --n-draft", "most drafted tokens in one block (default: what the measured costs say); 0: plain", "N")
    n_min: int = opt(0, "--spec-draft-n-min", "least drafted tokens in a block, while the draft delivers", "N")
    p_min: float = opt(0.0, "--spec-draft-p-min", "a block ends before a token less probable than this", "P")
    threads: int = opt(4, "-td --threads-draft", "threads of the draft worker (fewer if it has fewer cores)", "N")
    cores: str = opt("", "--draft-cores -Crd", "cores the draft worker may use", "LIST")
    ngl: int = opt(0, "-ngld --n-gpu-layers-draft --spec-draft-ngl", "layers of the draft on the GPU; -1: all", "N")
    place: Place = opt("spawn", "--draft-place", "spawn the draft worker here, or wait for a remote one")


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    n_predict: int | None = opt(None, "-n --predict --n-predict -n-predict", "tokens to generate, exactly (run with a prompt: 100)", "N")
    temperature: float = opt(0.1, "--temp --temperature -temperature", "0: always the likeliest token", "T")
    top_k: int = opt(0, "--top-k", "sample among the K likeliest; 0: off", "K")
    top_p: float = opt(1.0, "--top-p", "sample among the likeliest that together have probability P; 1: off", "P")
    min_p: float = opt(0.0, "--min-p", "drop tokens less probable than P times the likeliest; 0: off", "P")
    typical_p: float = opt(1.0, "--typical --typical-p", "sample among the tokens of most typical probability that together have P; 1: off", "P")
    top_n_sigma: float = opt(-1.0, "--top-n-sigma --top-nsigma", "drop tokens more than N standard deviations below the likeliest; not above 0: off", "N")
    dynatemp_range: float = opt(0.0, "--dynatemp-range", "vary the temperature by up to X with the entropy; 0: off", "X")
    dynatemp_exponent: float = opt(1.0, "--dynatemp-exp", "exponent by which the temperature follows the entropy", "X")
    xtc_probability: float = opt(0.0, "--xtc-probability", "probability that XTC leaves out the likeliest tokens; 0: off", "P")
    xtc_threshold: float = opt(0.1, "--xtc-threshold", "XTC: they are those of probability P or more but the last; above 0.5: off", "P")
    repeat_penalty: float = opt(1.0, "--repeat-penalty", "penalise repetition; 1: off", "X")
    repeat_last_n: int = opt(64, "--repeat-last-n", "tokens back that the three penalties look; 0: none, -1: all", "N")
    presence_penalty: float = opt(0.0, "--presence-penalty", "penalise tokens that occurred", "X")
    frequency_penalty: float = opt(0.0, "--frequency-penalty", "penalise tokens for each occurrence", "X")
    dry_multiplier: float = opt(0.0, "--dry-multiplier", "penalise tokens that make a repetition longer (DRY); 0: off", "X")
    dry_base: float = opt(1.75, "--dry-base", "DRY: factor of the penalty for each token more", "X")
    dry_allowed_length: int = opt(2, "--dry-allowed-length", "DRY: tokens that may be repeated", "N")
    dry_penalty_last_n: int = opt(64, "--dry-penalty-last-n", "DRY: tokens back that it looks; 0: none, -1: all", "N")
    dry_sequence_breakers: tuple[str, ...] = opt((), "--dry-sequence-breaker", "DRY: text over which no repetition reaches, instead of line end, :, \" and *; none: no such text (repeatable)", "TEXT")
    samplers: str | None = opt(None, "--samplers", "the samplers in use, such as penalties;top_k;temperature; any other is off", "NAMES")
    logit_bias: tuple[str, ...] = opt((), "--logit-bias", "change a token's logit, such as 15043+1 or 2-inf", "ID+X")
    seed: int = opt(-1, "-s --seed -seed", "seed of the sampling; -1: random, and shown", "N")
    stop: tuple[str, ...] = opt((), "--stop -r --reverse-prompt", "stop before this text, or at this control token (repeatable)", "TEXT")
    ignore_eos: bool = opt(False, "--ignore-eos", "never choose an end token")
    json_schema: str | None = opt(None, "-j --json-schema", "the answer is JSON that fits this schema; {}: any JSON", "SCHEMA")
    grammar: str | None = opt(None, "--grammar", "the answer is a text of this grammar in GBNF", "GBNF")


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    mode: Mode = opt("auto", "--mode", "auto: pipelined where draft and target have cores of their own, else sync")
    backend: Backend = opt("llama", "--backend", "toy: made-up models without files, to see the machinery")
    exact: bool = opt(False, "--exact", "arithmetic that does not depend on how many tokens are evaluated at once")
    parallel: int = opt(4, "-np --parallel", "requests served at the same time (run: one)", "N")
    ready_timeout_s: float = opt(300.0, "--ready-timeout", "how long loading may take, in seconds", "S")
    offline: bool = opt(False, "--offline", "never fetch anything")


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    listen: tuple[str, ...] = opt((), "--listen", "also listen here, such as tcp://127.0.0.1:5701 (repeatable)", "ADDRESS")
    insecure: tuple[str, ...] = opt((), "--insecure", "an address to listen on although anybody could connect", "ADDRESS")
    drain_s: float = opt(30.0, "--drain", "seconds that requests may still take after SIGTERM or Ctrl-C; 0: end at once", "S")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    host: str = opt("127.0.0.1", "--host", "address on which the gateway takes HTTP; beyond this machine only with API keys", "HOST")
    port: int = opt(5700, "--port", "port of the gateway; 0: any that is free", "N")
    no_gateway: bool = opt(False, "--no-gateway", "serve no HTTP")
    alias: str = opt("", "-a --alias", "name of the model in HTTP answers (default: the target's own)", "NAME")
    api_key: tuple[str, ...] = opt((), "", "keys of which HTTP requests must carry one")
    api_key_file: str = opt("", "--api-key-file", "file with API keys, one a line, that only its owner can read; or give them in [OUTRIDER_SERVER__API_KEY]", "FILE")
    allow_host: tuple[str, ...] = opt((), "--allow-host", "name by which HTTP requests may call this machine, besides localhost and its addresses (repeatable)", "NAME")
    allow_origin: tuple[str, ...] = opt((), "--allow-origin", "web page's origin, such as https://chat.example, whose scripts may send HTTP requests (repeatable)", "ORIGIN")
    timeout_s: float = opt(600.0, "--timeout", "longest wait for the next block of an answer over HTTP, in seconds", "S")
    metrics_compat: Compat = opt("none", "--metrics-compat", "/metrics tells what vLLM counts, too, once more by its names there")
    sse_ping_s: float = opt(15.0, "--sse-ping-interval", "a streamed answer that is silent for so many seconds gets a comment; 0: never", "S")
    allow_grammar: bool = opt(False, "--allow-grammar", "take grammars in GBNF from clients; JSON schemas are always taken")


@dataclass(frozen=True, slots=True)
class ToyOptions:
    agreement: float = opt(0.8, "--toy-agreement", "how often the made-up draft agrees with its target", "P")
    step_ms: float = opt(20.0, "--toy-step-ms", "milliseconds of a made-up target pass", "MS")
    row_ms: float = opt(0.2, "--toy-row-ms", "milliseconds of each further row in it", "MS")
    draft_ms: float = opt(2.0, "--toy-draft-ms", "milliseconds of a made-up drafted token", "MS")
    link_ms: float = opt(0.0, "--toy-link-ms", "milliseconds of each message to or from a made-up device", "MS")
    variant: int = opt(0, "--toy-variant", "another number: another vocabulary, which does not fit", "N")


@dataclass(frozen=True, slots=True)
class LogOptions:
    level: Literal["error", "warning", "info", "debug"] = opt("warning", "-lv --log-level", "what the services tell on stderr")
    format: Literal["auto", "text", "json"] = opt("auto", "--log-format", "lines of stderr: for people, or a JSON object each; auto: json where serve or worker does not write to a terminal")


@dataclass(frozen=True, slots=True)
class TerminalOptions:
    color_tokens: bool = opt(False, "--color-tokens", "on a terminal, show in colour and form which tokens were drafted, corrected, bonus and plain")
    history: bool = opt(True, "--history", "keep what is said in conversations, for the arrow keys of later ones; --history=false: keep nothing")


@dataclass(frozen=True, slots=True)
class Settings:
    target: TargetOptions = TargetOptions()
    draft: DraftOptions = DraftOptions()
    sampling: SamplingOptions = SamplingOptions()
    pipeline: PipelineOptions = PipelineOptions()
    coordinator: CoordinatorOptions = CoordinatorOptions()
    server: ServerOptions = ServerOptions()
    toy: ToyOptions = ToyOptions()
    log: LogOptions = LogOptions()
    terminal: TerminalOptions = TerminalOptions()


# fmt: on
@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table, as a program reads it."""

    key: str  # "draft.n_max"
    kind: Any  # its type
    default: Any
    flags: tuple[str, ...]
    help: str
    metavar: str | None

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return "OUTRIDER_" + self.key.replace(".", "__").upper()

    @property
    def flag(self) -> str:
        """The spelling that names it: the first with two dashes."""
        return next(flag for flag in self.flags if flag.startswith("--"))

    def of(self, settings: Settings) -> Any:
        """Its value."""
        section, name = self.key.split(".")
        return getattr(getattr(settings, section), name)

    @property
    def repeats(self) -> bool:
        """Whether it may be given more than once."""
        return get_origin(self.kind) is tuple

    def read(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError with what it should be."""
        kinds = [kind for kind in get_args(self.kind) if kind not in (type(None), ...)]
        if get_origin(self.kind) is Literal:
            if text not in kinds:
                raise ValueError(f"one of {', '.join(kinds)}")
            return text
        kind = kinds[0] if kinds else self.kind
        if kind is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if text.lower() not in words:
                raise ValueError("true or false")
            return words[text.lower()]
        try:
            return kind(text)
        except ValueError:
            raise ValueError({int: "a whole number", float: "a number"}.get(kind, "text")) from None


def _options() -> dict[str, Option]:
    found = {}
    for section in dataclasses.fields(Settings):
        kind: Any = section.default.__class__
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            key = f"{section.name}.{f.name}"
            m = f.metadata
            found[key] = Option(
                key, hints[f.name], f.default, tuple(m["flags"]), m["help"], m["metavar"]
            )
    return found


OPTIONS = _options()


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: which of `words` may have been meant."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def checked(settings: Settings) -> Settings:
    """The same settings. Raises ConfigError for the first value that is out of range."""
    target, draft, pipeline = settings.target, settings.draft, settings.pipeline
    for flag, value, least, most in (
        ("--threads", target.threads, 1, 512),
        ("--threads-draft", draft.threads, 1, 512),
        ("--ctx", target.ctx, 16, 1 << 20),
        ("--n-draft", draft.n_max or 0, 0, 64),
        ("--spec-draft-n-min", draft.n_min, 0, 64 if draft.n_max is None else draft.n_max),
        ("--spec-draft-p-min", draft.p_min, 0, 1),
        ("--parallel", pipeline.parallel, 1, 64),
        (
            "--n-predict",
            1 if settings.sampling.n_predict is None else settings.sampling.n_predict,
            1,
            1 << 20,
        ),
        ("--seed", settings.sampling.seed, -SEEDS, SEEDS - 1),
        ("--ready-timeout", pipeline.ready_timeout_s, 1, 86400),
        ("--drain", settings.coordinator.drain_s, 0, 86400),
        ("--port", settings.server.port, 0, 65535),
        ("--timeout", settings.server.timeout_s, 1, 86400),
        ("--sse-ping-interval", settings.server.sse_ping_s, 0, 86400),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{flag} must be from {least} to {most}, not {value}")
    cores(target.cores), cores(draft.cores), kernels(target.without)
    return settings


def kernels(text: str) -> frozenset[str]:
    """The kernels in a list such as "tiled,flash" to do without. Raises ConfigError."""
    found = (
        frozenset(filter(None, text.split(","))) if text not in ("auto", "none") else frozenset()
    )
    if wrong := found - set(KERNELS):
        raise ConfigError(f"{min(wrong)!r} is none of the kernels {', '.join(KERNELS)}")
    return found


def cores(text: str) -> set[int]:
    """The cores in a list such as "0,2-3". Raises ConfigError, also for those we may not use."""
    found: set[int] = set()
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of cores such as 0,2-3") from None
    if missing := found - os.sched_getaffinity(0):
        raise ConfigError(f"this process may not use core {min(missing)}")
    return found


def as_text(value: Any) -> str:
    """A value as a flag or a file would spell it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- the command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but mistakes raise ConfigError, and no flag is guessed from its beginning."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message[0].lower()}{message[1:]}; see `{self.prog} --help`")

    def check_flags(self, arguments: Sequence[str]) -> None:
        """Raises ConfigError for an unknown flag: argparse reads `-modle x` as `-m odle x`."""
        known = self._option_string_actions
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if not name.startswith("-") or name == "-" or " " in name or name in known:
                continue
            if not self._negative_number_matcher.match(name):
                raise ConfigError(f"unknown flag {name}{nearest(name, known)}")

    def with_values(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with `=true` behind each bare switch: argparse would take the prompt in
        `-v PROMPT` for its value.
        """
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        found = []
        for at, argument in enumerate(arguments):
            action = self._option_string_actions.get(argument) if at < end else None
            spelt = [*arguments[at + 1 : at + 2]] in (["true"], ["false"])
            is_switch = action is not None and action.nargs == "?" and not spelt
            found.append(f"{argument}=true" if is_switch else argument)
        return found


def add_options(parser: Parser, sections: Sequence[str], without: Iterable[str] = ()) -> None:
    """Give `parser` the flags of these sections of the table, but for the keys in `without`."""
    for section in sections:
        group = parser.add_argument_group(section)
        for option in OPTIONS.values():
            if option.key.startswith(f"{section}.") and option.key not in without and option.flags:
                _add(group, option)


def _add(group: Any, option: Option) -> None:
    def read(text: str) -> Any:
        try:
            return option.read(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"must be {exc}, not {text!r}") from None

    shown = (
        "" if option.default in (None, (), "", False) else f" (default {as_text(option.default)})"
    )
    several = "; as a variable a,b or a JSON array" if option.repeats else ""
    more: dict[str, Any] = {"metavar": option.metavar}
    if option.repeats:
        more["action"] = "append"
    elif option.kind is bool:
        more.update(
            nargs="?", const=True, metavar=None if option.metavar is None else option.metavar
        )
    elif get_origin(option.kind) is Literal:
        more["metavar"] = "{" + ",".join(get_args(option.kind)) + "}"
    group.add_argument(
        *option.flags,
        dest=option.key,
        type=read,
        default=None,
        help=f"{option.help}{several}{shown} [{option.variable}]".replace("%", "%%"),
        **more,
    )


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, by their keys."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(parsed).items()
        if key in OPTIONS and value is not None
    }


def to_flags(settings: Settings, sections: Sequence[str]) -> list[str]:
    """The flags by which a process of ours gets the same settings, without defaults and secrets."""
    flags = []
    for option in OPTIONS.values():
        value = option.of(settings)
        section = option.key.partition(".")[0]
        if section not in sections or value == option.default or value is None or not option.flags:
            continue
        for one in value if option.repeats else [value]:
            flags.append(f"{option.flag}={as_text(one)}")
    return flags
