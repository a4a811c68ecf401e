from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from outrider_services.models import catalogue

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
SSE, AVX2 = frozenset({"sse4_2"}), frozenset({"sse4_2", "avx2"})
AMX = AVX2 | {"avx512f", "amx_tile", "amx_int8"}
ARM = frozenset({"asimd"})


def load(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"scripts_{name}", str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    without_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    yield load("setup")
    sys.dont_write_bytecode = without_bytecode
    sys.path.remove(str(SCRIPTS))
    for name in ("scripts_setup", "toolchain", "gpus"):
        sys.modules.pop(name, None)


@pytest.fixture
def toolchain(setup: Any) -> Any:
    return sys.modules["toolchain"]


def program(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def compiler(directory: Path, name: str, version: str, family: str, build: str = "exit 1") -> None:
    case = f'case "$1" in --version) echo {family} {version};; -dumpversion) echo {version};;'
    program(directory, name, f"{case} *) {build};; esac")


def clang(directory: Path, number: int, build: str) -> None:
    suffix = f"-{number}" if number else ""
    for name in ("clang", "clang++"):
        compiler(directory, name + suffix, f"{number}.1.0", "Debian clang version", build)


OPENMP = 'for last; do :; done; printf "#!/bin/sh\\n" >"$last"; chmod +x "$last"'
NO_OPENMP = "exit 1"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of our making, with gcc 12 on it."""
    tools = tmp_path / "bin"
    for name in ("gcc", "g++"):
        compiler(tools, name, "12", "Debian GCC")
    (tools / "chmod").symlink_to("/bin/chmod")
    monkeypatch.setenv("PATH", str(tools))
    return tools


# --- the compiler ---


def name_of(toolchain: Any, choice: Any) -> str:
    return "ZIG" if choice.compiler == toolchain.ZIG else Path(choice.compiler.cxx).name


@pytest.mark.parametrize(
    ("machine", "flags", "chosen", "hint"),
    [
        pytest.param("x86_64", AVX2, "ZIG", "", id="avx2"),
        pytest.param("AMD64", AVX2 | {"avx512f"}, "ZIG", "", id="avx512"),
        pytest.param("x86_64", AMX, "g++", " 8 rows in 0.8 of the time", id="amx"),
        pytest.param("x86_64", SSE, "g++", " 8 rows in 0.5 to 0.8 of the time", id="sse"),
        pytest.param("aarch64", ARM, "g++", "", id="arm"),
    ],
)
def test_the_processor_decides_where_there_is_only_gcc(
    toolchain: Any, path: Path, machine: str, flags: frozenset[str], chosen: str, hint: str
) -> None:
    found = toolchain.choose_compiler({}, toolchain.Processor(machine, "", flags))
    assert name_of(toolchain, found) == chosen
    assert bool(found.hint) == bool(hint)
    assert hint in found.hint


@pytest.mark.parametrize(
    ("number", "build", "flags", "chosen"),
    [
        pytest.param(19, OPENMP, AVX2, "clang++-19", id="clang-avx2"),
        pytest.param(19, OPENMP, AMX, "clang++-19", id="clang-amx"),
        pytest.param(19, NO_OPENMP, AVX2, "ZIG", id="clang-without-openmp-avx2"),
        pytest.param(19, NO_OPENMP, AMX, "g++", id="clang-without-openmp-amx"),
        pytest.param(16, OPENMP, AVX2, "ZIG", id="clang-too-old-avx2"),
        pytest.param(16, OPENMP, AMX, "g++", id="clang-too-old-amx"),
    ],
)
def test_a_clang_is_taken_if_new_and_able(
    toolchain: Any, path: Path, number: int, build: str, flags: frozenset[str], chosen: str
) -> None:
    clang(path, number, build)
    found = toolchain.choose_compiler({}, toolchain.Processor("x86_64", "", flags))
    assert name_of(toolchain, found) == chosen
    c_name = chosen.replace("clang++", "clang").replace("g++", "gcc").replace("ZIG", "")
    assert Path(found.compiler.cc).name == c_name


def test_the_newest_clang_is_taken(toolchain: Any, path: Path) -> None:
    for number in (17, 20, 18):
        clang(path, number, OPENMP)
    cpu = toolchain.Processor("x86_64", "", AVX2)
    assert toolchain.choose_compiler({}, cpu).compiler.major == 20


@pytest.mark.parametrize(
    "environ", [{"CXX": "g++"}, {"CC": "gcc"}, {"CC": "gcc", "CXX": "g++"}], ids=str
)
@pytest.mark.parametrize("with_clang", [True, False], ids=["clang", "no-clang"])
def test_a_named_compiler_is_taken_before_any_other(
    toolchain: Any, path: Path, environ: dict[str, str], with_clang: bool
) -> None:
    if with_clang:
        clang(path, 19, OPENMP)
    choice = toolchain.choose_compiler(environ, toolchain.Processor("x86_64", "", AVX2))
    found = choice.compiler
    assert (Path(found.cc).name, Path(found.cxx).name) == ("gcc", "g++")
    assert (found.is_clang, found.major, choice.hint) == (False, 12, "")


def test_a_named_compiler_that_is_missing_is_told(toolchain: Any, path: Path) -> None:
    with pytest.raises(toolchain.NoCompiler, match="g\\+\\+-99"):
        toolchain.choose_compiler({"CXX": "g++-99"}, toolchain.Processor("x86_64", "", AVX2))


@pytest.mark.parametrize(
    ("machine", "flags"),
    [("x86_64", AMX), ("x86_64", SSE), ("aarch64", ARM)],
    ids=["amx", "", "arm"],
)
def test_without_a_compiler_one_sentence_says_so(
    toolchain: Any, path: Path, machine: str, flags: frozenset[str]
) -> None:
    (path / "g++").unlink()
    with pytest.raises(toolchain.NoCompiler, match=r"no C\+\+ compiler found; install one"):
        toolchain.choose_compiler({}, toolchain.Processor(machine, "", flags))


# --- what it lacks ---


def unpack(folder: Path, package: str) -> None:
    """What `pip install --target` leaves of ziglang and of pyomp, as far as it is used."""
    folder.mkdir(parents=True, exist_ok=True)
    if package.startswith("ziglang=="):
        told = '"$ZIG_GLOBAL_CACHE_DIR" "$ZIG_LOCAL_CACHE_DIR" "$@"'
        program(folder / "ziglang", "zig", f"printf '%s\\n' {told}")
    if package.startswith("pyomp=="):
        (folder / "numba").mkdir()
        (folder / "numba" / "libomp.so").write_text("LLVM's OpenMP")


def test_ziglang_becomes_a_compiler_that_runs(toolchain: Any, tmp_path: Path) -> None:
    folder = tmp_path / "someone's tools"
    found = toolchain.equipped(toolchain.ZIG, folder, unpack)
    for wrapper, command in ((found.cc, "cc"), (found.cxx, "c++")):
        call = [wrapper, "-c", "a file.c", "$HOME"]
        told = subprocess.run(call, capture_output=True, text=True, check=True).stdout.splitlines()
        cache = str(folder / "cache")
        assert told == [cache, cache, command, f"-I{folder}", "-c", "a file.c", "$HOME"]
    assert "int omp_get_max_threads(void);" in (folder / "omp.h").read_text()


def test_ziglang_comes_with_an_openmp(toolchain: Any, tmp_path: Path) -> None:
    folder = tmp_path / "someone's tools"
    found = toolchain.equipped(toolchain.ZIG, folder, unpack)
    library = folder / "numba" / "libomp.so"
    assert found.runtime == (library, "libomp.so")
    assert sorted(found.cmake_args) == [
        "-DOpenMP_CXX_FLAGS=-fopenmp",
        "-DOpenMP_CXX_LIB_NAMES=omp",
        "-DOpenMP_C_FLAGS=-fopenmp",
        "-DOpenMP_C_LIB_NAMES=omp",
        f"-DOpenMP_omp_LIBRARY={library}",
    ]
    assert (found.text, found.is_clang) == (toolchain.ZIG.text, True)


def test_gcc_has_its_openmp_replaced(toolchain: Any, tmp_path: Path) -> None:
    gcc, fetched = toolchain.Compiler("gcc", "g++", False, 12, "gcc 12"), []

    def fetch(folder: Path, package: str) -> None:
        fetched.append(package)
        unpack(folder, package)

    found = toolchain.equipped(gcc, tmp_path, fetch)
    assert found.runtime == (tmp_path / "numba" / "libomp.so", "libgomp.so.1")
    assert (found.cc, found.cxx, found.text, found.cmake_args) == ("gcc", "g++", "gcc 12", ())
    assert fetched == [toolchain.OPENMP]


def test_a_clang_that_is_installed_lacks_nothing(toolchain: Any, tmp_path: Path) -> None:
    def fetch(folder: Path, package: str) -> None:
        raise AssertionError(f"{package} was fetched")

    installed = toolchain.Compiler("clang", "clang++", True, 19, "clang 19")
    assert toolchain.equipped(installed, tmp_path, fetch) == installed


def test_a_package_without_the_openmp_library_is_told(toolchain: Any, tmp_path: Path) -> None:
    with pytest.raises(toolchain.NoCompiler, match=r"pyomp==.* has no libomp\.so"):
        toolchain.equipped(toolchain.ZIG, tmp_path, lambda folder, package: None)


# --- its flags ---


@pytest.mark.parametrize(
    ("is_clang", "major", "machine", "cpu_flags", "first", "choices"),
    [
        pytest.param(False, 12, "x86_64", AMX, "KEEP_TILE_STORES", 2, id="gcc-12-amx"),
        pytest.param(False, 13, "x86_64", AMX, "KEEP_TILE_STORES", 2, id="gcc-13-amx"),
        pytest.param(False, 14, "x86_64", AMX, "", 2, id="gcc-14-amx"),
        pytest.param(True, 13, "x86_64", AMX, "", 2, id="clang-13-amx"),
        pytest.param(True, 19, "x86_64", AMX, "", 2, id="clang-19-amx"),
        pytest.param(False, 12, "x86_64", frozenset({"avx2"}), "", 1, id="gcc-12-without-amx"),
        pytest.param(False, 12, "aarch64", frozenset({"asimd"}), "", 1, id="gcc-12-arm"),
    ],
)
def test_flags_fit_compiler_and_processor(
    toolchain: Any,
    is_clang: bool,
    major: int,
    machine: str,
    cpu_flags: frozenset[str],
    first: str,
    choices: int,
) -> None:
    built_with = toolchain.Compiler("cc", "c++", is_clang, major, "")
    found = toolchain.flag_choices(built_with, toolchain.Processor(machine, "", cpu_flags))
    assert found[0] == (getattr(toolchain, first) if first else ())
    assert found[1:] == [toolchain.NO_AMX][: choices - 1]


@pytest.mark.parametrize(
    ("cpuinfo", "model", "flags"),
    [
        pytest.param(
            "model name\t: Xeon\nflags\t\t: fpu amx_tile\n\nmodel name\t: Other\n",
            "Xeon",
            {"fpu", "amx_tile"},
            id="x86",
        ),
        pytest.param(
            "Features\t: fp asimd\nCPU part\t: 0xd40\n", "0xd40", {"fp", "asimd"}, id="arm"
        ),
        pytest.param("", "", set(), id="empty"),
    ],
)
def test_the_first_processor_is_read(
    toolchain: Any, tmp_path: Path, cpuinfo: str, model: str, flags: set[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    found = toolchain.processor(tmp_path / "cpuinfo")
    assert (found.model.strip(), found.flags) == (model, flags)
    assert toolchain.processor(tmp_path / "absent").flags == frozenset()


# --- what was done already ---


@pytest.fixture
def project(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The set-up script, working in a directory of ours, its pip calls only noted down."""
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(setup, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    monkeypatch.setattr(setup, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(setup, "make_venv", lambda: None)
    setup.said = []
    monkeypatch.setattr(setup, "say", setup.said.append)
    gcc = setup.Choice(setup.Compiler("gcc", "g++", False, 12, "gcc 12"), "it is there")
    monkeypatch.setattr(setup, "choose_compiler", lambda environ, cpu: gcc)
    setup.pip_calls = []
    monkeypatch.setattr(setup, "pip", lambda *args, env=None: setup.pip_calls.append(args))
    return setup


def machine(setup: Any, *flags: str) -> Any:
    return setup.Processor("x86_64", "some processor", frozenset(flags))


def test_what_is_set_up_is_known_until_something_changes(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = machine(project, "avx2")
    monkeypatch.setattr(project, "install_llama", lambda *args: None)
    assert not project.is_current({"llama"}, cpu)
    project.set_up({"llama", "test"}, cpu)
    assert project.is_current({"llama", "test"}, cpu)
    assert project.is_current({"llama"}, cpu)
    assert not project.is_current({"llama"}, machine(project, "avx2", "avx512f"))
    monkeypatch.setattr(project, "ROOT", project.ROOT / "scripts" / "..")
    assert not project.is_current({"llama"}, cpu)


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        ([], {"llama"}),
        (["--extra", "test"], {"llama", "test"}),
        (["--without-llama"], set()),
        (["--without-llama", "--extra", "test"], {"test"}),
    ],
    ids=lambda words: " ".join(sorted(words)),
)
def test_llama_is_left_out_only_if_asked(
    project: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], extras: set[str]
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(project, "set_up", lambda extras, cpu, gpu: asked.append(extras))
    monkeypatch.setattr(sys, "argv", ["setup", *arguments])
    project.main()
    assert asked == [extras]


def test_without_llama_no_compiler_is_looked_for(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(environ: object, cpu: object) -> None:
        raise project.NoCompiler("no compiler")

    cpu = machine(project)
    monkeypatch.setattr(project, "choose_compiler", looked)
    project.set_up({"test"}, cpu)
    assert project.is_current({"test"}, cpu)
    assert project.pip_calls == [("install", "--quiet", "--editable", f"{project.ROOT}[test]")]
    with pytest.raises(project.NoCompiler):
        project.set_up({"llama"}, cpu)


def test_a_set_up_adds_to_the_one_before(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, built = machine(project), []
    monkeypatch.setattr(project, "install_llama", lambda *args: built.append(args))
    assert not project.is_current(set(), cpu)
    project.set_up(set(), cpu)
    assert project.is_current(set(), cpu)
    project.set_up({"test"}, cpu)
    assert not project.is_current({"llama"}, cpu)
    project.set_up({"llama"}, cpu)
    assert project.is_current({"llama", "test"}, cpu)
    project.set_up({"plot", "llama"}, cpu)  # llama.cpp is not installed a second time
    assert project.is_current({"llama", "plot", "test"}, cpu)
    assert len(built) == 1


def test_an_interrupted_set_up_is_not_taken_for_a_whole_one(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    cpu = machine(project)
    project.set_up({"test"}, cpu)
    monkeypatch.setattr(project, "install_llama", interrupted)
    with pytest.raises(KeyboardInterrupt):
        project.set_up({"llama", "test"}, cpu)
    assert not project.is_current({"test"}, cpu)


def test_again_chooses_and_installs_anew(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(project, "install_llama", lambda _, by, *more: built.append(by.text))
    monkeypatch.setattr(sys, "argv", ["setup"])
    project.main()
    project.main()
    assert built == ["gcc 12"]
    clang = project.Choice(project.Compiler("clang", "clang++", True, 19, "clang 19"), "newer")
    monkeypatch.setattr(project, "choose_compiler", lambda environ, cpu: clang)
    monkeypatch.setattr(sys, "argv", ["setup", "--again"])
    project.main()
    assert built == ["gcc 12", "clang 19"]


@pytest.mark.parametrize(("arguments", "builds"), [([], 1), (["--again"], 2)], ids=str)
def test_again_does_not_take_what_another_set_up_did_meanwhile(
    project: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], builds: int
) -> None:
    built: list[object] = []
    monkeypatch.setattr(project, "install_llama", lambda *args: built.append(args))
    monkeypatch.setattr(sys, "argv", ["setup", *arguments])
    project.main()
    stamp = project.STAMP.read_text()
    project.STAMP.unlink()
    monkeypatch.setattr(project, "wait_for", lambda lock: project.STAMP.write_text(stamp))
    project.main()
    assert len(built) == builds


def vulkan(setup: Any) -> Any:
    return setup.Gpu("Vulkan", ("-DGGML_VULKAN=ON",), "headers 1", {"OF_GPU": "1"})


def test_later_set_ups_keep_to_the_gpu(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def install(requirement: str, compiler: object, cpu: object, gpu: Any) -> None:
        built.append(gpu.name if gpu else "cpu")

    monkeypatch.setattr(project, "install_llama", install)
    monkeypatch.setattr(project, "find", lambda name, environ: vulkan(project))
    for arguments in (
        [],
        ["--gpu", "vulkan"],
        [],
        ["--extra", "plot"],
        ["--gpu", "vulkan"],
        ["--again"],
        ["--gpu", "cpu"],
        [],
    ):
        monkeypatch.setattr(sys, "argv", ["setup", *arguments])
        project.main()
    assert built == ["cpu", "Vulkan", "Vulkan", "cpu"]


def test_what_a_gpu_lacks_is_told_and_changes_nothing(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(name: str, environ: object) -> None:
        raise project.Lacking("a build for Vulkan needs its library; `sudo apt install it`")

    cpu = machine(project)
    monkeypatch.setattr(project, "install_llama", lambda *args: None)
    monkeypatch.setattr(project, "processor", lambda cpuinfo: cpu)
    monkeypatch.setattr(project, "find", lacks)
    monkeypatch.setattr(sys, "argv", ["setup"])
    project.main()
    monkeypatch.setattr(sys, "argv", ["setup", "--gpu", "vulkan"])
    with pytest.raises(SystemExit, match=r"^setup: a build for Vulkan needs its library; `sudo a"):
        project.main()
    assert project.is_current({"llama"}, cpu, "cpu")


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "nonsense", '{"key": 1, "extras": null}'])
def test_a_damaged_stamp_means_setting_up_again(project: Any, damage: str) -> None:
    project.STAMP.write_text(damage)
    assert not project.is_current({"llama"}, machine(project))


# --- the wheel ---


ALONG = (
    r'install\(FILES "(.*)" DESTINATION "\$\{SKBUILD_PLATLIB_DIR\}/llama_cpp/lib" RENAME "(.*)"\)'
)


@pytest.fixture
def wheels(project: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The set-up script with a pip that builds nothing; `builds` lists what it was asked to build.

    `carried` lists the files that came into each wheel; `absent` is what the index does not have.
    """
    project.builds, project.carried, project.fetched = [], [], []
    project.absent, project.dies = "", False

    def pip(command: str, *args: str, env: Any = None) -> None:
        if "--target" in args:
            package = args[-1]
            if package.partition("==")[0] == project.absent:
                raise project.Failure(f"there is no {package}")
            project.fetched.append(package)
            unpack(Path(args[args.index("--target") + 1]), package)
        if command == "wheel":
            project.builds.append(env)
            include = shlex.split(env["CMAKE_ARGS"])[-1]
            lean = Path(include.removeprefix("-DCMAKE_PROJECT_llama_cpp_INCLUDE=")).read_text()
            along = re.findall(ALONG, lean)
            project.carried.append({name: Path(file).read_text() for file, name in along})
            done = Path(args[args.index("--wheel-dir") + 1])
            done.mkdir()
            (done / "llama.whl").touch()
            if project.dies:
                raise KeyboardInterrupt

    monkeypatch.setattr(project, "pip", pip)
    monkeypatch.setattr(project, "is_proved", lambda wheel: True)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setenv("CFLAGS", "-g")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    return project


def wheel(setup: Any, flags: tuple[str, ...] = (), text: str = "gcc 12", cpu: str = "avx2") -> Any:
    built_with = setup.Compiler("/bin/cc", "/bin/c++", False, 12, text)
    return setup.cached_wheel("llama==1", built_with, machine(setup, cpu), flags)


def test_a_wheel_is_built_once_for_each_thing_that_shapes_it(wheels: Any) -> None:
    first = wheel(wheels)
    assert first.exists()
    assert wheel(wheels) == first
    assert len(wheels.builds) == 1
    others = {wheel(wheels, flags=("-x",)), wheel(wheels, text="gcc 13"), wheel(wheels, cpu="amx")}
    assert len(others | {first}) == len(wheels.builds) == 4


def test_a_wheel_for_a_gpu_is_another_one(wheels: Any) -> None:
    plain, gpu = wheel(wheels), vulkan(wheels)
    built_with = wheels.Compiler("/bin/cc", "/bin/c++", False, 12, "gcc 12")

    def make(gpu: Any) -> Any:
        return wheels.cached_wheel("llama==1", built_with, machine(wheels, "avx2"), (), gpu)

    found = {make(gpu), make(gpu), make(replace(gpu, found="headers 2"))}
    assert len(found | {plain}) == len(wheels.builds) == 3
    without, with_gpu, _ = wheels.builds
    assert "-DGGML_VULKAN=ON" in shlex.split(with_gpu["CMAKE_ARGS"])
    assert (with_gpu["OF_GPU"], with_gpu["CC"]) == ("1", "/bin/cc")
    assert "VULKAN" not in without["CMAKE_ARGS"]
    assert wheels.carried[1]["built-by.txt"] == "gcc 12, for Vulkan\n"


def test_a_library_whose_driver_is_elsewhere_stays_unproved(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "echo OSError: libcuda.so.1: cannot open shared object file >&2; exit 1"
    program(tmp_path, "python", f'case "$1" in -c) echo model.gguf;; *) {says};; esac')
    monkeypatch.setattr(project, "PYTHON", tmp_path / "python")
    assert project.is_proved(tmp_path / "llama.whl")
    assert not list(tmp_path.glob("verdict-*"))
    assert "libcuda.so.1" in project.said[-1]


def test_a_build_that_was_cut_off_is_never_used(wheels: Any) -> None:
    wheels.dies = True
    with pytest.raises(KeyboardInterrupt):
        wheel(wheels)
    wheels.dies = False
    assert wheel(wheels).exists()
    assert len(wheels.builds) == 2
    assert not list((wheels.CACHE / "wheels").glob(".building-*"))


def test_a_build_keeps_the_users_flags_and_stays_native(wheels: Any) -> None:
    wheel(wheels, flags=("-fno-dse",))
    (env,) = wheels.builds
    assert (env["CC"], env["CXX"], env["CFLAGS"]) == ("/bin/cc", "/bin/c++", "-g -fno-dse")
    assert env["CXXFLAGS"].split()[-1] == "-fno-dse"
    assert "-DLLAVA_BUILD=OFF" in env["CMAKE_ARGS"]
    assert "SOURCE_DATE_EPOCH" not in env


def test_a_wheel_of_unpacked_tools_is_built_once(wheels: Any) -> None:
    cpu = machine(wheels, "avx2")
    first = wheels.cached_wheel("llama==1", wheels.ZIG, cpu, ())
    fetched = [*wheels.fetched]
    assert wheels.cached_wheel("llama==1", wheels.ZIG, cpu, ()) == first
    assert len(wheels.builds) == 1
    assert wheels.fetched == fetched
    assert {package.partition("==")[0] for package in fetched} == {"ziglang", "pyomp"}


def test_a_wheel_carries_its_runtime_and_its_compilers_name(wheels: Any) -> None:
    wheel(wheels, text="gcc 12")
    wheels.cached_wheel("llama==1", wheels.ZIG, machine(wheels, "avx2"), ())
    assert wheels.carried == [
        {"built-by.txt": "gcc 12\n", "libgomp.so.1": "LLVM's OpenMP"},
        {"built-by.txt": f"{wheels.ZIG.text}\n", "libomp.so": "LLVM's OpenMP"},
    ]


def test_a_machine_without_any_compiler_still_builds(
    wheels: Any, toolchain: Any, path: Path
) -> None:
    for name in ("gcc", "g++"):
        (path / name).unlink()
    cpu = machine(wheels, "avx2")
    wheels.build_llama("llama==1", toolchain.choose_compiler({}, cpu), cpu)
    (env,) = wheels.builds
    assert [Path(env[name]).name for name in ("CC", "CXX")] == ["zig-cc", "zig-c++"]
    assert "-DOpenMP_CXX_FLAGS=-fopenmp" in shlex.split(env["CMAKE_ARGS"])
    assert not [line for line in wheels.said if "did not work" in line]


@pytest.mark.parametrize(
    ("absent", "carried"),
    [
        pytest.param("ziglang", {"built-by.txt", "libgomp.so.1"}, id="no-ziglang"),
        pytest.param("pyomp", {"built-by.txt"}, id="no-pyomp"),
    ],
)
def test_gcc_builds_where_ziglang_cannot_be_had(
    wheels: Any, toolchain: Any, path: Path, absent: str, carried: set[str]
) -> None:
    wheels.absent = absent
    cpu = machine(wheels, "avx2")
    wheels.build_llama("llama==1", toolchain.choose_compiler({}, cpu), cpu)
    assert [env["CXX"] for env in wheels.builds] == [str(path / "g++")]
    assert [set(files) for files in wheels.carried] == [carried]
    said = "\n".join(wheels.said)
    assert f"that did not work: there is no {absent}==" in said
    assert "compiler: Debian GCC 12; it is what is installed." in said
    assert "`sudo apt install clang-19 libomp-19-dev`, then `scripts/setup --again`." in said


def test_without_ziglang_and_gcc_one_sentence_says_so(
    wheels: Any, toolchain: Any, path: Path
) -> None:
    (path / "g++").unlink()
    wheels.absent = "ziglang"
    cpu = machine(wheels, "avx2")
    with pytest.raises(wheels.NoCompiler, match=r"no C\+\+ compiler found; install one"):
        wheels.build_llama("llama==1", toolchain.choose_compiler({}, cpu), cpu)


def test_gcc_does_without_a_runtime_that_cannot_be_had(wheels: Any) -> None:
    wheels.absent = "pyomp"
    assert wheel(wheels).exists()
    assert wheels.carried == [{"built-by.txt": "gcc 12\n"}]
    assert [line for line in wheels.said if "its own OpenMP is used" in line and "pyomp" in line]


def test_a_compiler_that_was_found_gives_way_to_no_other(
    wheels: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "is_proved", lambda wheel: False)
    clang = wheels.Choice(wheels.Compiler("clang", "clang++", True, 19, "clang 19"), "it is named")
    with pytest.raises(wheels.Failure, match="clang 19 builds crashes"):
        wheels.build_llama("llama==1", clang, machine(wheels, "avx2"))
    assert [env["CXX"] for env in wheels.builds] == ["clang++"]


def test_a_library_that_crashes_is_built_again_without_amx(
    wheels: Any, toolchain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "is_proved", lambda wheel: len(wheels.builds) == 2)
    gcc = toolchain.Compiler("cc", "c++", False, 12, "gcc 12")
    wheels.install_llama("llama==1", gcc, machine(wheels, "amx_tile"))
    assert [env["CFLAGS"] for env in wheels.builds] == [
        "-g -fno-tree-dse -fno-dse",
        "-g -mno-amx-tile -mno-amx-int8 -mno-amx-bf16",
    ]
    monkeypatch.setattr(wheels, "is_proved", lambda wheel: False)
    with pytest.raises(wheels.Failure, match="gcc 12 builds crashes; name another compiler"):
        wheels.install_llama("llama==1", gcc, machine(wheels, "amx_tile"))


@pytest.mark.parametrize(
    ("probe", "proved", "verdict"),
    [
        pytest.param("kill -SEGV $$", False, "crashes", id="crash"),
        pytest.param("exit 0", True, "decodes", id="decodes"),
    ],
)
def test_the_proof_is_remembered_beside_the_wheel(
    project: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probe: str,
    proved: bool,
    verdict: str,
) -> None:
    program(tmp_path, "python", f'case "$1" in -c) echo model.gguf;; *) {probe};; esac')
    monkeypatch.setattr(project, "PYTHON", tmp_path / "python")
    assert project.is_proved(tmp_path / "llama.whl") is proved
    (remembered,) = tmp_path.glob("verdict-*")
    assert remembered.read_text() == verdict
    monkeypatch.setattr(project, "PYTHON", tmp_path / "gone")
    assert project.is_proved(tmp_path / "llama.whl") is proved
    # another probe asks anew
    (tmp_path / "probe.py").write_text("")
    monkeypatch.setattr(project, "PROBE", tmp_path / "probe.py")
    with pytest.raises(FileNotFoundError):
        project.is_proved(tmp_path / "llama.whl")


def test_the_proof_fetches_the_test_model(
    setup: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "fetch", lambda source: f"/models/{source.file}")
    exec(setup.FETCH, {})
    assert capsys.readouterr().out == f"/models/{catalogue.TEST_MODEL.file}\n"


def test_without_a_test_model_nothing_is_remembered(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "python", "exit 1")
    monkeypatch.setattr(project, "PYTHON", tmp_path / "python")
    assert project.is_proved(tmp_path / "llama.whl")
    assert not list(tmp_path.glob("verdict-*"))


def test_a_failing_command_is_told_with_its_last_lines(project: Any) -> None:
    with pytest.raises(project.Failure, match=r"it failed; .*setup\.log, its end:\n(.*\n)*  why"):
        project.run(["sh", "-c", "echo before; echo why >&2; exit 3"], "it failed")


@pytest.mark.parametrize("script", ["run", "test", "check", "matrix", "setup", "../.ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(SCRIPTS / script, os.X_OK)
    if script != "setup":
        subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
