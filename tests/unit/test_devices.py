"""Which devices a model gets, of those that llama.cpp sees."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest

from outrider.engines.llama.devices import KINDS, Device, Offload, arguments, choose, present, usual
from outrider.errors import ConfigError, InternalError, ModelUnusable, OutriderError, RequestTimeout
from outrider_services import options, sources
from outrider_services.commands import devices as verb
from outrider_services.pipeline.arguments import own_settings
from outrider_services.table import DraftOptions, TargetOptions

CPU = Device("CPU", "a processor", "cpu", 1, 2)
ONE = Device("CUDA0", "a card", "gpu", 3, 4, "0000:01:00.0", 11)
OTHER = Device("CUDA1", "another", "gpu", 5, 6, "0000:02:00.0", 12)
AGAIN = Device("Vulkan0", "a card", "gpu", 3, 4, "0000:01:00.0", 13)
ON_CHIP = Device("Vulkan1", "a part of the processor", "igpu", 7, 8, "", 14)
SOFT = Device("Vulkan0", "llvmpipe (LLVM 15.0.6, 256 bits)", "gpu", 9, 9, "", 15)
SEEN = [ONE, OTHER, AGAIN, ON_CHIP, CPU]


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        pytest.param(Offload(), (), id="nothing-asked"),
        pytest.param(Offload(0, ("CUDA0",)), (), id="no-layers"),
        pytest.param(Offload(-1), (ONE, OTHER), id="all-GPUs-once-each"),
        pytest.param(Offload(5, ("cuda1",)), (OTHER,), id="by-name"),
        pytest.param(Offload(-1, ("CUDA1", "CUDA0", "CUDA1")), (OTHER, ONE), id="in-order"),
        pytest.param(Offload(-1, ("Vulkan1",)), (ON_CHIP,), id="on-the-chip"),
        pytest.param(Offload(-1, (), (), 1), (OTHER,), id="the-second-one"),
        pytest.param(Offload(-1, ("CUDA1", "CUDA0"), (), 1), (ONE,), id="the-second-one-named"),
        pytest.param(Offload(-1, ("none",)), (), id="none"),
    ],
)
def test_a_model_gets_the_devices_that_were_asked_for(
    asked: Offload, chosen: tuple[Device, ...]
) -> None:
    assert choose(SEEN, asked) == chosen


def test_the_gpu_on_the_chip_is_taken_where_there_is_no_other() -> None:
    assert usual([ON_CHIP, CPU]) == (ON_CHIP,)
    assert usual([CPU]) == ()


@pytest.mark.parametrize(
    ("seen", "asked", "sentence"),
    [
        (SEEN, Offload(-1, ("CUDA7",)), "no device 'CUDA7'; there are CUDA0 (a card), CUDA1 (ano"),
        (SEEN, Offload(-1, ("CPU",)), ""),
        (
            [CPU],
            Offload(-1, ("CUDA0",)),
            "no device 'CUDA0'; llama.cpp sees no device here but the",
        ),
        ([CPU], Offload(-1), "no GPU for the layers of the model; llama.cpp sees no device"),
        (SEEN, Offload(-1, (), (), 2), "no GPU number 2; there are CUDA0 (a card), CUDA1 (another"),
        (SEEN, Offload(-1, ("CUDA0",), (3, 1)), "2 shares of the model are for more devices than"),
    ],
)
def test_what_is_not_there_is_one_sentence_naming_what_is(
    seen: list[Device], asked: Offload, sentence: str
) -> None:
    if not sentence:  # a name of the processor
        assert choose(seen, asked) == ()
        return
    with pytest.raises(ConfigError) as told:
        choose(seen, asked)
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_devices_are_told_apart_by_where_they_are() -> None:
    assert ONE.unit == AGAIN.unit != OTHER.unit
    assert ON_CHIP.unit == "Vulkan1"
    assert CPU.unit == SOFT.unit == "cpu"  # Mesa's software device computes there


class Library:
    """Bindings of a llama.cpp that sees `SEEN`."""

    def __init__(self) -> None:
        self._lib = self
        self.ggml_backend_dev_count = Function(lambda: len(SEEN))
        self.ggml_backend_dev_get = Function(lambda number: number.value + 100)
        self.ggml_backend_dev_get_props = Function(self.tell)

    def llama_max_devices(self) -> int:
        return 16

    def tell(self, handle: Any, reference: Any) -> None:
        device, told = SEEN[handle.value - 100], reference._obj
        told.name, told.description = device.name.encode(), device.description.encode()
        told.free, told.total, told.kind = device.free, device.total, KINDS.index(device.kind)
        told.address = device.address.encode() or None


class Function:
    """A function of a library: its result's type can be set."""

    def __init__(self, call: Any) -> None:
        self.call, self.restype = call, None

    def __call__(self, *given: Any) -> Any:
        return self.call(*given)


def test_what_the_library_tells_is_read() -> None:
    found = present(Library())
    assert found == SEEN
    assert [one.handle for one in found] == [100, 101, 102, 103, 104]


def test_the_library_is_told_the_devices_and_their_shares() -> None:
    told = arguments(Library(), (OTHER, ONE), (3, 1))
    listed = ctypes.cast(told["devices"], ctypes.POINTER(ctypes.c_void_p))
    assert [listed[n] for n in range(3)] == [12, 11, None]
    assert [told["tensor_split"][n] for n in range(16)] == [3, 1, *[0] * 14]
    nobody = ctypes.cast(arguments(Library(), (), ())["devices"], ctypes.POINTER(ctypes.c_void_p))
    assert nobody[0] is None  # an empty list is not no list, which means all


# --- the settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, Offload()),
        ({"device": "CUDA0"}, Offload(-1, ("CUDA0",))),
        ({"device": "CUDA0, CUDA1", "ngl": 7}, Offload(7, ("CUDA0", "CUDA1"))),
        ({"device": "none", "ngl": 7}, Offload()),
        ({"device": "CPU"}, Offload()),
        ({"device": "CUDA0", "ngl": 0}, Offload()),
        ({"ngl": -1}, Offload(-1)),
        ({"split": "3,1"}, Offload(-1, (), (3.0, 1.0))),
        ({"split": "3/1", "ngl": 9}, Offload(9, (), (3.0, 1.0))),
        ({"main_gpu": 0}, Offload(-1, (), (), 0)),
    ],
    ids=str,
)
def test_flags_say_which_layers_are_where(given: dict[str, Any], asked: Offload) -> None:
    assert options.offload(TargetOptions(**given)) == asked


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("target.device", "none,CUDA0", "names the processor and other devices"),
        ("target.split", "3,x", "'3,x' is not a list of shares such as 3,1"),
        ("target.split", "0,0", "not a list of shares"),
        ("target.split", "nan", "not a list of shares"),
        ("target.split", "-1,2", "not a list of shares"),
        ("target.ngl", -2, "--n-gpu-layers must be from -1"),
        ("draft.ngl", 10_000, "--n-gpu-layers-draft must be from -1 to 9999"),
        ("target.main_gpu", -1, "--main-gpu must be from 0"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        sources.settings({key: value})


def test_a_draft_worker_gets_the_drafts_devices() -> None:
    given = {"draft.device": "Vulkan0", "draft.ngl": 3, "target.device": "CUDA0"}
    own = own_settings("draft", sources.settings(given)).target
    assert options.offload(own) == Offload(3, ("Vulkan0",))
    assert options.offload(DraftOptions()) == Offload()


# --- the command ---------------------------------------------------------------------------------


def listed(monkeypatch: pytest.MonkeyPatch, said: str, limit_s: float = 10) -> Any:
    monkeypatch.setattr(verb, "LOOK", (sys.executable, "-c", said))
    monkeypatch.setattr(verb, "LIMIT_S", limit_s)
    return verb.ask()


def test_a_child_tells_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [{key: value for key, value in asdict(one).items() if key != "handle"} for one in SEEN]
    assert listed(monkeypatch, f"print('noise'); print({json.dumps(json.dumps(told))})") == told
    verb.devices(sources.settings({}), type("Parsed", (), {"look": False, "json": False}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [one.name for one in SEEN]
    assert lines[0].split() == ["device", "description", "GiB", "free", "GiB"]


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ('print(\'["error", "model_unusable", "why"]\')', ModelUnusable, "^why$"),
        ("raise SystemExit(3)", InternalError, "status 3"),
        ("print('nonsense')", InternalError, "status 0"),
        ("import time; time.sleep(60)", RequestTimeout, "took more than 0.2 s"),
    ],
)
def test_a_child_that_cannot_tell_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[OutriderError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        listed(monkeypatch, said, 0.2 if "sleep" in said else 10)


def test_the_command_itself_never_loads_llama_cpp() -> None:
    program = (
        "import sys\n"
        "from outrider_services.commands import cli, devices\n"
        "devices.LOOK = (sys.executable, '-c', 'print([])')\n"
        "cli.dispatch(['devices'])\n"
        "print([name for name in sys.modules if name.startswith('llama_cpp')])"
    )
    run = [sys.executable, "-c", program]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "[]"


def test_without_a_device_nothing_is_handed_to_the_library() -> None:
    assert Offload() == replace(Offload(3, ("CUDA0",)), layers=0, devices=())
    with pytest.raises(ValueError, match="below 0"):
        Offload(-2)
