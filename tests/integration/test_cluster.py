"""A Ray cluster of several nodes: what `scripts/cluster` shows, as far as it fits the time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile

import pytest
from tests.attack.service import ROOT, with_paths

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs `--extra ray`"),
]


def run(*parts: str) -> str:
    """In a process of its own, for Ray leaves threads and sockets behind.

    So do whole nodes that are killed: their sockets are where nobody else looks.
    """
    only = [f"--only={part}" for part in parts]
    command = [sys.executable, "-m", "tests.cluster.campaign", *only]
    with tempfile.TemporaryDirectory(prefix="or-") as runtime:
        env = {**with_paths(os.environ), "XDG_RUNTIME_DIR": runtime}
        done = subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_no_stream_is_lost_with_a_node_and_a_lost_draft_costs_speed_only() -> None:
    told = run("kill", "draft")
    (elsewhere,) = re.findall(r"32 right, 0 errors; (\d+) went on elsewhere", told)
    assert int(elsewhere) > 0
    assert "4 right, " in told
