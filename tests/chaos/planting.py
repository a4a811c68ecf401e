"""A plugin of pytest that plants one bug: `PLANTED="the base is shifted by one" pytest -p …`.

The module's source is changed as it is imported; no file is. A run in which the module was never
imported ends with status 70, one whose bug does not fit the source with an error.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING

from tests.chaos.planted import BY_NAME, Bug

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]
NOT_PLANTED = 70


class Planter(importlib.abc.MetaPathFinder):
    """Finds the one module that has the bug."""

    def __init__(self, bug: Bug) -> None:
        self.bug, self.is_planted = bug, False
        self.module = ".".join(Path(bug.file).with_suffix("").parts[1:])

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        place = str(ROOT / self.bug.file)
        return spec_from_file_location(name, place, loader=Loader(name, place, self))


class Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, place: str, planter: Planter) -> None:
        super().__init__(name, place)
        self._planter = planter

    def get_code(self, fullname: str) -> CodeType:
        source = planted(self._planter.bug, Path(self.path).read_text())
        self._planter.is_planted = True
        code: CodeType = compile(source, self.path, "exec")
        return code


def planted(bug: Bug, source: str) -> str:
    """The source with the bug. Raises ValueError if it does not fit there."""
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.name!r} fits {source.count(bug.old)} places in {bug.file}")
    return source.replace(bug.old, bug.new)


PLANTER = Planter(BY_NAME[os.environ["PLANTED"]])
sys.meta_path.insert(0, PLANTER)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not PLANTER.is_planted:
        session.exitstatus = NOT_PLANTED
