"""Versions, and hooks that find vLLM changed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from verl_speculator.serving import compatibility
from verl_speculator.serving.compatibility import UnsupportedEngineError, check_version, require_parameters, wrap


@pytest.mark.parametrize("version", ["0.28.0", "0.28.0+cpu", "0.30.1rc1", "0.32.0"])
def test_supported(version: str) -> None:
    assert check_version(version) is None


@pytest.mark.parametrize("version", ["0.27.9", "0.9.2", "0.6.4.post1"])
def test_too_old(version: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=rf"vLLM {version} is installed: install vllm>=0\.28"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.33.0", "1.0.0", "dev"])
def test_newer_than_tested_is_told(version: str) -> None:
    assert version in (check_version(version) or "")


class Runner:
    def step(self, value: int) -> int:
        return value


def test_wrapping_twice_is_wrapping_once(monkeypatch) -> None:
    monkeypatch.setattr(Runner, "step", Runner.step)
    for _ in range(2):
        wrap(Runner, "step", lambda original: lambda self, value: original(self, value) + 1)
    assert Runner().step(1) == 2


def test_what_moved_is_named(monkeypatch) -> None:
    monkeypatch.setattr(compatibility, "_version", lambda: "0.99")
    with pytest.raises(UnsupportedEngineError, match=r"in vLLM 0\.99: Runner has no propose any more; it was tested"):
        wrap(Runner, "propose", lambda original: original)
    with pytest.raises(UnsupportedEngineError, match=r"Runner\.step has no parameter hidden any more"):
        require_parameters(Runner.step, ["value", "hidden"])


def test_plugin_loads_without_torch_and_says_why_it_cannot_help() -> None:
    """Where vLLM has moved what the hook is put on, vLLM goes on and stderr tells."""
    code = (
        "import sys, types\n"
        "for name in ('vllm', 'vllm.config', 'vllm.config.speculative'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "from verl_speculator.serving.plugin import register\n"
        "register()\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "False False\n"
    assert (
        "this vLLM cannot serve its speculators; everything else works as usual. The reason: ImportError"
        in result.stderr
    )
