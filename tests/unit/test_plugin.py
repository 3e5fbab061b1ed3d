"""verl loads our plugin by its entry point, and a failure to load it is told although verl swallows it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def test_entry_point() -> None:
    (ours,) = entry_points(group="verl.plugins", name="verl_speculator")
    assert ours.value == "verl_speculator.plugin"


@pytest.mark.slow
def test_user_sees_why_it_cannot_load() -> None:
    code = (
        "import sys\n"
        "sys.modules['verl_speculator.platforms.cpu'] = None  # importing it fails\n"
        "import verl\n"
        "print('verl goes on')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "verl goes on"
    assert "verl_speculator: its plugin for verl could not load, so verl runs without it" in result.stderr
    assert "import of verl_speculator.platforms.cpu halted" in result.stderr
