"""llama-cpp-python is built once for whatever shapes it, proved, and known until that changes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.compilers import AVX2, only_gcc, program, unpack

from outrider_services.building import library, toolchain
from outrider_services.building.gpus import Gpu, Lacking
from outrider_services.building.library import Environment, Failure, Library
from outrider_services.building.toolchain import ZIG, Choice, Compiler, NoCompiler, Processor
from outrider_services.models import catalogue

REQUIREMENT = "llama==1"
GCC = Compiler("/bin/cc", "/bin/c++", False, 12, "gcc 12")
VULKAN = Gpu("Vulkan", ("-DGGML_VULKAN=ON",), "headers 1", {"OF_GPU": "1"})
ALONG = (
    r'install\(FILES "(.*)" DESTINATION "\$\{SKBUILD_PLATLIB_DIR\}/llama_cpp/lib" RENAME "(.*)"\)'
)


class Index(Environment):
    """An environment whose pip builds nothing."""

    def __init__(self, python: Path) -> None:
        super().__init__(python)
        self.builds: list[Mapping[str, str]] = []  # variables of the builds that were asked for
        self.carried: list[dict[str, str]] = []  # files that came into each wheel
        self.fetched: list[str] = []
        self.absent = ""  # what the index does not have
        self.dies = False

    def pip(self, *args: str, env: Mapping[str, str] | None = None) -> None:
        if "--target" in args:
            package = args[-1]
            if package.partition("==")[0] == self.absent:
                raise Failure(f"there is no {package}")
            self.fetched.append(package)
            unpack(Path(args[args.index("--target") + 1]), package)
        if args[0] == "wheel":
            assert env
            self.builds.append(env)
            include = shlex.split(env["CMAKE_ARGS"])[-1]
            lean = Path(include.removeprefix("-DCMAKE_PROJECT_llama_cpp_INCLUDE=")).read_text()
            self.carried.append(
                {name: Path(file).read_text() for file, name in re.findall(ALONG, lean)}
            )
            done = Path(args[args.index("--wheel-dir") + 1])
            done.mkdir()
            (done / "llama.whl").touch()
            if self.dies:
                raise KeyboardInterrupt


class Tried(Library):
    """One whose environment is an `Index`, on a processor of our choice."""

    environment: Index

    def __init__(self, environment: Index) -> None:
        self.said: list[str] = []
        super().__init__(environment, REQUIREMENT, self.said.append)
        self.cpu = processor("avx2")

    def is_proved(self, wheel: Path) -> bool:
        return True


def processor(*flags: str) -> Processor:
    return Processor("x86_64", "some processor", frozenset(flags))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = only_gcc(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tools))
    return tools


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    home.mkdir()
    monkeypatch.setattr(library, "CACHE", home)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setenv("CFLAGS", "-g")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    return home


@pytest.fixture
def tried(tmp_path: Path) -> Tried:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return Tried(Index(python))


# ---- what was done already ----------------------------------------------------------------------


@pytest.fixture
def built(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By which compiler, and for which GPU, it was built each time: nothing else is done."""
    found: list[str] = []

    def build(choice: Choice, gpu: Gpu | None = None) -> None:
        found.append(f"{choice.compiler.text}{' for ' + gpu.name if gpu else ''}")

    monkeypatch.setattr(tried, "build", build)
    monkeypatch.setattr(library, "choose_compiler", lambda environ, cpu: Choice(GCC, "it is there"))
    monkeypatch.setattr(library, "find", lambda name, environ: VULKAN)
    return found


def test_what_is_built_is_known_until_something_changes(tried: Tried, built: list[str]) -> None:
    assert not tried.is_current()
    tried.set_up()
    tried.set_up()
    assert tried.is_current()
    assert built == ["gcc 12"]
    tried.cpu = processor("avx2", "avx512f")
    assert not tried.is_current()
    tried.cpu = processor("avx2")
    tried.requirement = "llama==2"
    assert not tried.is_current()


def test_later_set_ups_keep_to_the_gpu(tried: Tried, built: list[str]) -> None:
    asked: tuple[tuple[str | None, bool], ...] = (
        (None, False),
        ("vulkan", False),
        (None, False),
        ("vulkan", False),
        (None, True),
        ("cpu", False),
        (None, False),
    )
    for gpu, again in asked:
        tried.set_up(gpu, again)
    assert built == ["gcc 12", "gcc 12 for Vulkan", "gcc 12 for Vulkan", "gcc 12"]


def test_again_chooses_anew(
    tried: Tried, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried.set_up()
    clang = Choice(Compiler("clang", "clang++", True, 19, "clang 19"), "newer")
    monkeypatch.setattr(library, "choose_compiler", lambda environ, cpu: clang)
    tried.set_up()
    tried.set_up(again=True)
    assert built == ["gcc 12", "clang 19"]


def test_what_a_gpu_lacks_is_told_and_changes_nothing(
    tried: Tried, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(name: str, environ: object) -> None:
        raise Lacking("a build for Vulkan needs its library")

    tried.set_up()
    monkeypatch.setattr(library, "find", lacks)
    with pytest.raises(Lacking):
        tried.set_up("vulkan")
    assert tried.is_current("cpu")


def test_a_build_that_fails_is_not_taken_for_a_whole_one(
    tried: Tried, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    tried.set_up()
    monkeypatch.setattr(tried, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried.set_up("vulkan")
    assert not tried.is_current()


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "nonsense", '{"key": 1, "gpu": null}'])
def test_a_damaged_stamp_means_building_again(tried: Tried, damage: str) -> None:
    tried.stamp.write_text(damage)
    assert not tried.is_current()
    assert tried.built_for == "cpu"


# ---- the wheel ----------------------------------------------------------------------------------


def wheel(
    tried: Tried, flags: tuple[str, ...] = (), text: str = "gcc 12", cpu: str = "avx2"
) -> Path:
    tried.cpu = processor(cpu)
    return tried.wheel(replace(GCC, text=text), flags)


def test_a_wheel_is_built_once_for_each_thing_that_shapes_it(tried: Tried) -> None:
    first = wheel(tried)
    assert first.exists()
    assert wheel(tried) == first
    assert len(tried.environment.builds) == 1
    others = {wheel(tried, flags=("-x",)), wheel(tried, text="gcc 13"), wheel(tried, cpu="amx")}
    assert len(others | {first}) == len(tried.environment.builds) == 4


def test_a_wheel_for_a_gpu_is_another_one(tried: Tried) -> None:
    plain = wheel(tried)
    newer = replace(VULKAN, found="headers 2")
    found = {tried.wheel(GCC, (), gpu) for gpu in (VULKAN, VULKAN, newer)}
    assert len(found | {plain}) == len(tried.environment.builds) == 3
    without, with_gpu, _ = tried.environment.builds
    assert "-DGGML_VULKAN=ON" in shlex.split(with_gpu["CMAKE_ARGS"])
    assert (with_gpu["OF_GPU"], with_gpu["CC"]) == ("1", "/bin/cc")
    assert "VULKAN" not in without["CMAKE_ARGS"]
    assert tried.environment.carried[1]["built-by.txt"] == "gcc 12, for Vulkan\n"


def test_a_build_that_was_cut_off_is_never_used(tried: Tried, cache: Path) -> None:
    tried.environment.dies = True
    with pytest.raises(KeyboardInterrupt):
        wheel(tried)
    tried.environment.dies = False
    assert wheel(tried).exists()
    assert len(tried.environment.builds) == 2
    assert not list((cache / "wheels").glob(".building-*"))


def test_a_build_keeps_the_users_flags_and_stays_native(tried: Tried) -> None:
    wheel(tried, flags=("-fno-dse",))
    (env,) = tried.environment.builds
    assert (env["CC"], env["CXX"], env["CFLAGS"]) == ("/bin/cc", "/bin/c++", "-g -fno-dse")
    assert env["CXXFLAGS"].split()[-1] == "-fno-dse"
    assert "-DLLAVA_BUILD=OFF" in env["CMAKE_ARGS"]
    assert "SOURCE_DATE_EPOCH" not in env


def test_a_wheel_of_unpacked_tools_is_built_once(tried: Tried) -> None:
    first = tried.wheel(ZIG, ())
    fetched = [*tried.environment.fetched]
    assert tried.wheel(ZIG, ()) == first
    assert len(tried.environment.builds) == 1
    assert tried.environment.fetched == fetched
    assert {package.partition("==")[0] for package in fetched} == {"ziglang", "pyomp"}


def test_a_wheel_carries_its_runtime_and_its_compilers_name(tried: Tried) -> None:
    wheel(tried, text="gcc 12")
    tried.wheel(ZIG, ())
    assert tried.environment.carried == [
        {"built-by.txt": "gcc 12\n", "libgomp.so.1": "LLVM's OpenMP"},
        {"built-by.txt": f"{ZIG.text}\n", "libomp.so": "LLVM's OpenMP"},
    ]


def chosen(tried: Tried) -> Choice:
    tried.cpu = Processor("x86_64", "", AVX2)
    return toolchain.choose_compiler({}, tried.cpu)


def test_a_machine_without_any_compiler_still_builds(tried: Tried, path: Path) -> None:
    for name in ("gcc", "g++"):
        (path / name).unlink()
    tried.build(chosen(tried))
    (env,) = tried.environment.builds
    assert [Path(env[name]).name for name in ("CC", "CXX")] == ["zig-cc", "zig-c++"]
    assert "-DOpenMP_CXX_FLAGS=-fopenmp" in shlex.split(env["CMAKE_ARGS"])
    assert not [line for line in tried.said if "did not work" in line]


@pytest.mark.parametrize(
    ("absent", "carried"),
    [
        pytest.param("ziglang", {"built-by.txt", "libgomp.so.1"}, id="no-ziglang"),
        pytest.param("pyomp", {"built-by.txt"}, id="no-pyomp"),
    ],
)
def test_gcc_builds_where_ziglang_cannot_be_had(
    tried: Tried, path: Path, absent: str, carried: set[str]
) -> None:
    tried.environment.absent = absent
    tried.build(chosen(tried))
    assert [env["CXX"] for env in tried.environment.builds] == [str(path / "g++")]
    assert [set(files) for files in tried.environment.carried] == [carried]
    said = "\n".join(tried.said)
    assert f"that did not work: there is no {absent}==" in said
    assert "compiler: Debian GCC 12; it is what is installed." in said
    assert "`sudo apt install clang-19 libomp-19-dev`, then `outrider setup --again`." in said


def test_without_ziglang_and_gcc_one_sentence_says_so(tried: Tried, path: Path) -> None:
    (path / "g++").unlink()
    tried.environment.absent = "ziglang"
    with pytest.raises(NoCompiler, match=r"no C\+\+ compiler found; install one"):
        tried.build(chosen(tried))


def test_gcc_does_without_a_runtime_that_cannot_be_had(tried: Tried) -> None:
    tried.environment.absent = "pyomp"
    assert wheel(tried).exists()
    assert tried.environment.carried == [{"built-by.txt": "gcc 12\n"}]
    assert [line for line in tried.said if "its own OpenMP is used" in line and "pyomp" in line]


def test_a_compiler_that_was_found_gives_way_to_no_other(
    tried: Tried, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tried, "is_proved", lambda wheel: False)
    clang = Choice(Compiler("clang", "clang++", True, 19, "clang 19"), "it is named")
    with pytest.raises(Failure, match="clang 19 builds crashes"):
        tried.build(clang)
    assert [env["CXX"] for env in tried.environment.builds] == ["clang++"]


def test_a_library_that_crashes_is_built_again_without_amx(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = tried.environment.builds
    monkeypatch.setattr(tried, "is_proved", lambda wheel: len(builds) == 2)
    tried.cpu = processor("amx_tile")
    tried.install(GCC)
    assert [env["CFLAGS"] for env in builds] == [
        "-g -fno-tree-dse -fno-dse",
        "-g -mno-amx-tile -mno-amx-int8 -mno-amx-bf16",
    ]
    monkeypatch.setattr(tried, "is_proved", lambda wheel: False)
    with pytest.raises(Failure, match="gcc 12 builds crashes; name another compiler"):
        tried.install(GCC)


# ---- the proof ----------------------------------------------------------------------------------


@pytest.fixture
def proved(tmp_path: Path) -> Any:
    """A library whose Python does what the test has written."""
    return Library(Environment(tmp_path / "python"), REQUIREMENT, lambda text: None)


@pytest.mark.parametrize(
    ("probe", "is_sound", "verdict"),
    [
        pytest.param("kill -SEGV $$", False, "crashes", id="crash"),
        pytest.param("exit 0", True, "decodes", id="decodes"),
    ],
)
def test_the_proof_is_remembered_beside_the_wheel(
    proved: Library,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probe: str,
    is_sound: bool,
    verdict: str,
) -> None:
    program(tmp_path, "python", f'case "$1" in -c) echo model.gguf;; *) {probe};; esac')
    assert proved.is_proved(tmp_path / "llama.whl") is is_sound
    (remembered,) = tmp_path.glob("verdict-*")
    assert remembered.read_text() == verdict
    proved.environment.python = tmp_path / "gone"
    assert proved.is_proved(tmp_path / "llama.whl") is is_sound
    # another probe asks anew
    (tmp_path / "probe_llama.py").write_text("")
    monkeypatch.setattr(library, "HERE", tmp_path)
    with pytest.raises(FileNotFoundError):
        proved.is_proved(tmp_path / "llama.whl")


def test_a_library_whose_driver_is_elsewhere_stays_unproved(
    tmp_path: Path, proved: Library
) -> None:
    says = "echo OSError: libcuda.so.1: cannot open shared object file >&2; exit 1"
    program(tmp_path, "python", f'case "$1" in -c) echo model.gguf;; *) {says};; esac')
    said: list[str] = []
    proved.say = said.append
    assert proved.is_proved(tmp_path / "llama.whl")
    assert not list(tmp_path.glob("verdict-*"))
    assert "libcuda.so.1" in said[-1]


def test_the_proof_fetches_the_test_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "fetch", lambda source: f"/models/{source.file}")
    exec(library.FETCH, {})
    assert capsys.readouterr().out == f"/models/{catalogue.TEST_MODEL.file}\n"


def test_without_a_test_model_nothing_is_remembered(tmp_path: Path, proved: Library) -> None:
    program(tmp_path, "python", "exit 1")
    assert proved.is_proved(tmp_path / "llama.whl")
    assert not list(tmp_path.glob("verdict-*"))


# ---- the environment ----------------------------------------------------------------------------


def test_a_failing_command_is_told_with_its_last_lines(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "python")
    with pytest.raises(Failure, match=r"it failed; .*setup\.log, its end:\n(.*\n)*  why"):
        environment.run(["sh", "-c", "echo before; echo why >&2; exit 3"], "it failed")


def test_an_environment_without_pip_is_given_one(tmp_path: Path) -> None:
    """As `uv tool install` makes them."""
    asked = tmp_path / "asked"
    program(tmp_path, "python", f'[ "$2" = "import pip" ] && exit 1; echo "$@" >>"{asked}"')
    Environment(tmp_path / "python").equip()
    assert asked.read_text() == "-m ensurepip\n"
    program(tmp_path, "python", f'echo "$@" >>"{asked}.more"')
    Environment(tmp_path / "python").equip()
    assert (tmp_path / "asked.more").read_text() == "-c import pip\n"


def test_one_set_up_waits_for_the_other(cache: Path) -> None:
    said: list[str] = []
    with library.alone(said.append), pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "LOCK_TIMEOUT_S", 0.1)
        with pytest.raises(Failure, match="another set-up has held"), library.alone(said.append):
            pass
    assert said == ["waiting for another set-up to end …"]
