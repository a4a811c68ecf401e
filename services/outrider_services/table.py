"""Every setting once: its key, spellings, type, default and help. `options` reads this table.

A class is a section, a field a setting. A row's help is a clause, its default what most want.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Mode = Literal["plain", "sync", "pipelined", "auto"]
Backend = Literal["llama", "toy"]
Place = Literal["spawn", "remote", "both"]
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
    device: str = opt("", "-dev --device", "devices for the target's layers, such as CUDA0 or Vulkan0,Vulkan1 (`outrider devices` lists them); none: the processor", "NAMES")
    ngl: int | None = opt(None, "-ngl --n-gpu-layers --gpu-layers", "layers of the target on its devices; -1: all (default: all where a device is named, else 0)", "N")
    split: str = opt("", "-ts --tensor-split", "shares of the target's layers for each of its devices, such as 3,1 (default: by free memory)", "LIST")
    main_gpu: int | None = opt(None, "-mg --main-gpu", "number of the one of its devices that gets all of them", "N")
    place: Place = opt("spawn", "--target-place", "spawn the target worker here, wait for remote ones, or both")


@dataclass(frozen=True, slots=True)
class DraftOptions:
    model: str | None = opt(None, "-md --model-draft -draft-model --draft-model --spec-draft-model --draft", "draft model; suffix: none, what followed where the text repeats itself is drafted (serve's default)", "FILE")
    hf: str | None = opt(None, "-hfd --hf-repo-draft --spec-draft-hf", "draft model from the hub", "USER/REPO[:QUANT]")
    quant: Quant = opt("auto", "--draft-quant", "re-quantise the draft: the type that `outrider tune` found (found at once for the default pair), none, or this")
    n_max: int | None = opt(None, "--spec-draft-n-max -n-draft --n-draft", "most drafted tokens in one block (default: what the measured costs say); 0: plain", "N")
    n_min: int = opt(0, "--spec-draft-n-min", "least drafted tokens in a block, while the draft delivers", "N")
    p_min: float = opt(0.0, "--spec-draft-p-min", "a block ends before a token less probable than this", "P")
    threads: int = opt(4, "-td --threads-draft", "threads of the draft worker (fewer if it has fewer cores)", "N")
    cores: str = opt("", "--draft-cores -Crd", "cores the draft worker may use", "LIST")
    device: str = opt("", "-devd --device-draft --spec-draft-device", "devices for the draft's layers; none: the processor", "NAMES")
    ngl: int | None = opt(None, "-ngld --n-gpu-layers-draft --gpu-layers-draft --spec-draft-ngl", "layers of the draft on its devices, as -ngl", "N")
    place: Place = opt("spawn", "--draft-place", "spawn the draft worker here, wait for remote ones, or both")


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
    mode: Mode = opt("auto", "--mode", "auto: pipelined where draft and target share no core and no GPU, else sync")
    backend: Backend = opt("llama", "--backend", "toy: made-up models without files, to see the machinery")
    exact: bool = opt(False, "--exact", "arithmetic that does not depend on how many tokens are evaluated at once")
    suffix: bool = opt(False, "--draft-suffix", "beside the draft model, draft what followed where the text repeats itself")
    suffix_memory: int = opt(0, "--draft-suffix-memory", "tokens of earlier texts with the same API key in which a draft without a model looks, too; 0: in its own text alone", "N")
    branches: int = opt(16, "--draft-branches", "corrections of the draft to foresee at once, where its passes cost little more for them, and to verify beside a block, where the target's do; 0: none", "N")
    parallel: int = opt(4, "-np --parallel", "requests served at the same time (run: one)", "N")
    ready_timeout_s: float = opt(300.0, "--ready-timeout", "how long loading may take, in seconds", "S")
    offline: bool = opt(False, "--offline", "never fetch anything")


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    listen: tuple[str, ...] = opt((), "--listen", "also listen here, such as tcp://127.0.0.1:5701 (repeatable)", "ADDRESS")
    resume_s: float = opt(120.0, "--resume-timeout", "seconds that requests wait for a target worker that was lost to be there again; 0: they end with it", "S")
    drain_s: float = opt(30.0, "--drain", "seconds that requests may still take after SIGTERM or Ctrl-C; 0: end at once", "S")


@dataclass(frozen=True, slots=True)
class HostOptions:
    coordinator: str = opt("", "--coordinator-host", "in a file for several machines (serve -f), the host of the coordinator (default: the target's)", "HOST")
    target: str = opt("", "--target-host", "the host of the target worker (default: the coordinator's)", "HOST")
    draft: str = opt("", "--draft-host", "the host of the draft worker (default: the coordinator's)", "HOST")


@dataclass(frozen=True, slots=True)
class LinkOptions:
    keys: str = opt("", "--keys", "directory of the keys that links beyond this machine need (default: outrider/curve where your settings are); where it is named, tcp:// links on this machine have keys, too", "DIR")
    insecure: tuple[str, ...] = opt((), "--insecure", "an address beyond this machine to use without keys: anybody can read along, and connect (repeatable)", "ADDRESS")


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
    rows: str = opt("", "--toy-rows", "what made-up target passes cost, in passes over one row, such as 2:1.6,5:2.4; straight lines between (default: by --toy-row-ms)", "ROWS:X,…")
    draft_ms: float = opt(2.0, "--toy-draft-ms", "milliseconds of a made-up drafted token", "MS")
    draft_row_ms: float | None = opt(None, "--toy-draft-row-ms", "milliseconds of each further token in the same pass (default: as the first)", "MS")
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
    hosts: HostOptions = HostOptions()
    links: LinkOptions = LinkOptions()
    server: ServerOptions = ServerOptions()
    toy: ToyOptions = ToyOptions()
    log: LogOptions = LogOptions()
    terminal: TerminalOptions = TerminalOptions()

# fmt: on
