"""llama-cpp-python, built for this processor and put into a Python environment.

Its wheel is kept in the user's cache under a key of everything that shaped it. Left to itself the
build crashes on AMX processors with gcc before 14, so flags are chosen for what is found, and the
result is proved by decoding a few rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from outrider_services.building.gpus import KINDS, LAYER_SETTINGS, Gpu, Lacking, find
from outrider_services.building.toolchain import (
    NO_AMX,
    OPENMP,
    ZIG,
    Choice,
    Compiler,
    NoCompiler,
    choose_compiler,
    equipped,
    flag_choices,
    present_gcc,
    processor,
)

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"
LOCK_TIMEOUT_S = 3600.0
CMAKE_ARGS = ("-DLLAVA_BUILD=OFF", "-DGGML_CCACHE=OFF", "-DLLAMA_ALL_WARNINGS=OFF",
              "-DGGML_ALL_WARNINGS=OFF")  # fmt: skip
FETCH = """
from outrider_services.models import catalogue
print(catalogue.fetch(catalogue.TEST_MODEL))
"""
# the package forces its common library on, half of the build; a plain variable outranks that
LEAN_CMAKE = "set(LLAMA_BUILD_COMMON OFF)\n"
BUILT_BY = "built-by.txt"  # the compiler, for `outrider tune` to tell
ALONG_CMAKE = (
    'install(FILES "{}" DESTINATION "${{SKBUILD_PLATLIB_DIR}}/llama_cpp/lib" RENAME "{}")\n'
)

Say = Callable[[str], None]


class Failure(Exception):
    """One sentence for the user."""


TOLD = (Failure, Lacking, NoCompiler, OSError, subprocess.SubprocessError)  # of whatever fails


@contextmanager
def alone(say: Say) -> Iterator[None]:
    """Inside, no other set-up of this user runs. Raises Failure if one has run for an hour."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "setup.lock").open("w") as lock:
        wait_for(lock.fileno(), say)
        yield


def wait_for(lock: int, say: Say) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    waiting = False
    while True:
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.monotonic() > deadline:
            raise Failure(f"another set-up has held {CACHE / 'setup.lock'} for an hour; end it")
        if not waiting:
            say("waiting for another set-up to end …")
        waiting = True
        time.sleep(0.5)


class Environment:
    """A Python environment, and the programs that run in it, whose output goes to a log."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self.log = CACHE / "setup.log"

    def pip(self, *args: str, env: Mapping[str, str] | None = None) -> None:
        common = ["--disable-pip-version-check", "--no-input"]
        self.run([str(self.python), "-m", "pip", *args, *common], f"`pip {args[0]}` failed", env)

    def run(self, command: list[str], failure: str, env: Mapping[str, str] | None = None) -> None:
        """Raises Failure, with the end of what the command has printed."""
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        if done.returncode:
            last = "\n  ".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise Failure(f"{failure}; the full output is in {self.log}, its end:\n  {last}")

    def equip(self) -> None:
        """Let it have pip: the environments of uv come without."""
        asked = [str(self.python), "-c", "import pip"]
        if subprocess.run(asked, capture_output=True).returncode:
            remedy = "this environment has no pip, and making it failed"
            self.run([str(self.python), "-m", "ensurepip"], remedy)


class Library:
    """The llama-cpp-python of one environment."""

    def __init__(self, environment: Environment, requirement: str, say: Say) -> None:
        self.environment, self.requirement, self.say = environment, requirement, say
        self.cpu = processor(Path("/proc/cpuinfo"))
        self.stamp = environment.python.parent.parent / "outrider-llama.json"

    # ---- what was done already ------------------------------------------------------------------

    @property
    def key(self) -> str:
        files = [path.read_text() for path in sorted(HERE.glob("*.py"))]
        return digest(
            [*files, self.requirement, sys.version, self.cpu.model, *sorted(self.cpu.flags)]
        )

    @property
    def built_for(self) -> str:
        """The kind of GPU that it was last built for; "cpu": for none."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            kind = json.loads(self.stamp.read_text()).get("gpu")
            return kind if kind in KINDS else "cpu"
        return "cpu"

    def is_current(self, gpu: str | None = None) -> bool:
        """Whether it is there as it would be built now; without `gpu` any kind will do."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            stamp = json.loads(self.stamp.read_text())
            is_same = bool(stamp["key"] == self.key)
            return is_same and self.environment.python.exists() and gpu in (None, self.built_for)
        return False

    def set_up(self, gpu: str | None = None, again: bool = False) -> None:
        """Build and install it, unless it is there; for the same GPU as before, unless told.

        `again`: choose the compiler and build anew. Raises what `TOLD` lists.
        """
        gpu = gpu or self.built_for
        if again:
            self.stamp.unlink(missing_ok=True)
            shutil.rmtree(CACHE / "wheels", ignore_errors=True)
        if self.is_current(gpu):
            return
        kind = find(gpu, os.environ) if gpu != "cpu" else None
        self.stamp.unlink(missing_ok=True)
        self.environment.equip()
        self.build(choose_compiler(os.environ, self.cpu), kind)
        self.stamp.write_text(json.dumps({"key": self.key, "gpu": gpu}))

    # ---- the wheel ------------------------------------------------------------------------------

    def build(self, choice: Choice, gpu: Gpu | None = None) -> None:
        """Install what the chosen compiler builds; where it cannot be had, the next."""
        self.say(f"compiler: {choice.compiler.text}; {choice.why}.")
        if choice.hint:
            self.say(f"{choice.hint}.")
        try:
            self.install(choice.compiler, gpu)
        except (Failure, NoCompiler) as exc:
            if choice.compiler != ZIG:
                raise
            self.say(f"that did not work: {exc}")
            self.build(present_gcc(self.cpu), gpu)

    def install(self, compiler: Compiler, gpu: Gpu | None = None) -> None:
        pip = self.environment.pip
        for flags in flag_choices(compiler, self.cpu):
            wheel = self.wheel(compiler, flags, gpu)
            pip("install", "--quiet", "--force-reinstall", "--no-deps", str(wheel))
            pip("install", "--quiet", self.requirement)  # its dependencies; itself is there
            if self.is_proved(wheel):
                return
            if self.cpu.has_amx and flags != NO_AMX:
                told = "the library crashes with AMX as this compiler builds it; doing without AMX."
                self.say(told)
        crashes = f"the library that {compiler.text} builds crashes"
        raise Failure(f"{crashes}; name another compiler in CXX")

    def wheel(self, compiler: Compiler, flags: Iterable[str], gpu: Gpu | None = None) -> Path:
        """The one that this compiler builds with these flags: from the cache, or made."""
        cmake_args = [*CMAKE_ARGS, *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        for_c, for_cxx = (shlex.join([*shlex.split(os.environ.get(name, "")), *flags])
                          for name in ("CFLAGS", "CXXFLAGS"))  # fmt: skip
        cpu = self.cpu
        parts = [self.requirement, compiler.cc, compiler.cxx, compiler.text, cpu.machine, cpu.model,
                 *sorted(cpu.flags), *cmake_args, for_c, for_cxx, LEAN_CMAKE, ALONG_CMAKE,
                 OPENMP]  # fmt: skip
        key = digest([*parts, gpu.name, gpu.found, LAYER_SETTINGS] if gpu else parts)
        home = CACHE / "wheels" / key
        if found := list(home.glob("*.whl")):
            return found[0]
        what = f"{self.requirement} for {gpu.name}" if gpu else self.requirement
        self.say(f"building {what} with {compiler.text} (some minutes, once) …")
        home.parent.mkdir(parents=True, exist_ok=True)
        for killed in home.parent.glob(".building-*"):
            shutil.rmtree(killed, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".building-") as scratch:
            compiler = self.with_tools(compiler, Path(scratch, "tools"))
            cmake_args += [*compiler.cmake_args, *included(Path(scratch), compiler, gpu)]
            env = {**os.environ, **(gpu.env if gpu else {}), "CC": compiler.cc,
                   "CXX": compiler.cxx, "CFLAGS": for_c, "CXXFLAGS": for_cxx,
                   "CMAKE_ARGS": shlex.join(cmake_args),
                   "SKBUILD_WHEEL_EXCLUDE": "lib/**;include/**"}  # fmt: skip
            env.pop("SOURCE_DATE_EPOCH", None)  # would switch building for this processor off
            package = self.requirement.partition("==")[0]
            self.environment.pip(
                "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-binary", package,
                "--wheel-dir", f"{scratch}/done", self.requirement, env=env)  # fmt: skip
            shutil.rmtree(home, ignore_errors=True)
            Path(scratch, "done").rename(home)  # a cut-off build never has this name
        return next(home.glob("*.whl"))

    def with_tools(self, compiler: Compiler, folder: Path) -> Compiler:
        """The compiler with what it lacks; gcc can do without."""

        def fetch(folder: Path, package: str) -> None:
            self.environment.pip(
                "install", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:",
                "--target", str(folder), package)  # fmt: skip

        try:
            return equipped(compiler, folder, fetch)
        except (Failure, NoCompiler) as exc:
            if compiler == ZIG:
                raise
            told = f"its own OpenMP is used, which serves several requests at once slowly: {exc}"
            self.say(told)
            return compiler

    def is_proved(self, wheel: Path) -> bool:
        """Whether the installed `wheel` decodes; remembered beside it unless there was no model."""
        probe = HERE / "probe_llama.py"
        verdict = wheel.parent / f"verdict-{digest([probe.read_text()])}"
        if verdict.exists():
            return verdict.read_text() == "decodes"
        self.say("proving the library with a small model …")
        python = str(self.environment.python)
        fetched = subprocess.run([python, "-c", FETCH], capture_output=True, text=True)
        if fetched.returncode:
            reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
            told = f"the library stays unproved, the test model could not be fetched: {reason}"
            self.say(told)
            return True
        command = [python, str(probe), fetched.stdout.strip()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode > 0:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            if "cannot open shared object file" in last:  # a driver of the GPU's, as in an image
                self.say(f"the library stays unproved, it cannot be loaded here: {last}")
                return True
            raise Failure(f"proving the library failed: {last}")
        if done.returncode < 0:
            self.say(f"decoding ended with {signal.Signals(-done.returncode).name}.")
        verdict.write_text("crashes" if done.returncode else "decodes")
        return done.returncode == 0


def included(scratch: Path, compiler: Compiler, gpu: Gpu | None) -> list[str]:
    """How CMake is told what goes into the wheel along with the library, and of the GPU."""
    lean, built_by = scratch / "lean.cmake", scratch / BUILT_BY
    built_by.write_text(f"{compiler.text}{f', for {gpu.name}' if gpu else ''}\n")
    along = [(built_by, BUILT_BY), *filter(None, [compiler.runtime])]
    lean.write_text(LEAN_CMAKE + "".join(ALONG_CMAKE.format(*file) for file in along))
    of_gpu = (*gpu.cmake_args, *gpu.equip(scratch / "gpu")) if gpu else ()
    return [*of_gpu, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={lean}"]


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]
