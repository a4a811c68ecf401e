"""The devices that llama.cpp computes on, by the names that it gives them, such as CUDA0.

`lib` is the module of bindings, handed in by `outrider.engines.llama.engine`; they leave these
functions out, which the library has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.errors import ConfigError

KINDS = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type
PROCESSOR = ("none", "cpu")  # how one may name it
SOFTWARE = ("llvmpipe", "SwiftShader")  # what Vulkan offers, and the processor computes
NO_GPU = (
    "llama.cpp sees no device here but the processor (`outrider setup --gpu` builds it for GPUs; "
    "one of Vulkan's that is made of software must be named in GGML_VK_VISIBLE_DEVICES)"
)


@dataclass(frozen=True, slots=True)
class Offload:
    """Which layers of a model other devices than the processor are to compute."""

    layers: int = 0  # how many, the last ones; -1: all
    devices: tuple[str, ...] = ()  # names; none: the GPUs that llama.cpp would take
    split: tuple[float, ...] = ()  # the devices' shares; none: by their free memory
    main: int | None = None  # the number of the one that gets all; None: they share

    def __post_init__(self) -> None:
        if self.layers < -1 or (self.main or 0) < 0:
            raise ValueError("a number of layers or of a GPU is below 0")


ON_PROCESSOR = Offload()


@dataclass(frozen=True, slots=True)
class Device:
    """One that this process sees."""

    name: str
    description: str
    kind: str
    free: int  # bytes
    total: int
    address: str = ""  # on the bus, such as 0000:c1:00.0; "": unknown
    handle: int = field(default=0, compare=False, repr=False)

    @property
    def unit(self) -> str:
        """What tells it from others on this machine, in all processes: names are given in each."""
        on_processor = self.kind == "cpu" or self.is_software
        return "cpu" if on_processor else self.address or self.name

    @property
    def is_software(self) -> bool:
        """Whether it is one of Vulkan's that the processor computes."""
        return self.description.startswith(SOFTWARE)


class _Properties(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("free", ctypes.c_size_t),
        ("total", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("address", ctypes.c_char_p),
        ("abilities", ctypes.c_bool * 64),  # five of them today
    )


def present(lib: Any) -> list[Device]:
    """All devices that this process sees, the processor among them."""
    functions = lib._lib
    functions.ggml_backend_dev_count.restype = ctypes.c_size_t
    functions.ggml_backend_dev_get.restype = ctypes.c_void_p
    found = []
    for number in range(functions.ggml_backend_dev_count()):
        handle = functions.ggml_backend_dev_get(ctypes.c_size_t(number))
        told = _Properties()
        functions.ggml_backend_dev_get_props(ctypes.c_void_p(handle), ctypes.byref(told))
        name, description, address = (
            (text or b"").decode("utf-8", "replace").strip()
            for text in (told.name, told.description, told.address)
        )
        kind = KINDS[told.kind] if told.kind < len(KINDS) else "other"
        found.append(Device(name, description, kind, told.free, told.total, address, handle))
    return found


def choose(seen: Sequence[Device], offload: Offload) -> tuple[Device, ...]:
    """The devices of `seen` that get layers; none: the processor computes all.

    Raises ConfigError naming those that there are.
    """
    if not offload.layers or {name.lower() for name in offload.devices} & {*PROCESSOR}:
        return ()
    if offload.devices:
        found = tuple(_named(seen, name) for name in dict.fromkeys(offload.devices))
    else:
        found = usual(seen)
    if not found:
        raise ConfigError(f"there is no GPU for the layers of the model; {_those(seen)}")
    if offload.main is not None:
        if offload.main >= len(found):
            raise ConfigError(f"there is no GPU number {offload.main}; {_those(found)}")
        found = (found[offload.main],)
    if len(offload.split) > len(found):
        raise ConfigError(
            f"{len(offload.split)} shares of the model are for more devices than "
            f"{', '.join(device.name for device in found)}"
        )
    return found


def usual(seen: Sequence[Device]) -> tuple[Device, ...]:
    """Those that llama.cpp takes if none is named: all GPUs, once each, or the one on the chip."""
    found: dict[str, Device] = {}
    for device in seen:
        if device.kind == "gpu":
            found.setdefault(device.address or device.name, device)
    on_chip = [device for device in seen if device.kind == "igpu"]
    return tuple(found.values()) or tuple(on_chip[:1])


def arguments(lib: Any, chosen: Sequence[Device], split: Sequence[float]) -> dict[str, Any]:
    """The fields of `llama_model_params` for these devices; the memory that they point at is kept
    as long as their values.
    """
    # an empty list: llama.cpp keeps no GPU at hand for large batches, nor weights where it reaches
    # them, which would keep the processor from those in an order of its own
    listed = (ctypes.c_void_p * (len(chosen) + 1))(*(device.handle for device in chosen))
    found: dict[str, Any] = {"devices": ctypes.cast(listed, ctypes.c_void_p)}
    if split:
        shares = (ctypes.c_float * max(lib.llama_max_devices(), len(chosen)))(*split)
        found["tensor_split"] = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    return found


def _named(seen: Sequence[Device], name: str) -> Device:
    for device in seen:
        if device.name.lower() == name.lower() and device.kind != "cpu":
            return device
    raise ConfigError(f"there is no device {name!r:.80}; {_those(seen)}")


def _those(seen: Sequence[Device]) -> str:
    """The end of a sentence about what is not there: what is."""
    others = [device for device in seen if device.kind != "cpu"]
    if not others:
        return NO_GPU
    return "there are " + ", ".join(f"{one.name} ({one.description})" for one in others)
