"""EAGLE-3 and DFlash checkpoints in stock vLLM on CPU, without our plugin and with it: same text, same drafts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.eagle3_serving import SPECULATORS
from tests.integration.test_vllm import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def run_script(*arguments: str | Path, **variables: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("eagle3_serving.py")), *map(str, arguments)]
    result = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_script("world", folder)
    return folder


@pytest.fixture(scope="module", params=["without our plugin", "with our plugin"])
def report(request, world) -> dict:
    # An empty list loads none; without the variable all are loaded.
    imported = {"VERL_SPECULATOR_IMPORT": str(world / "medusa.py")}
    variables = {"VLLM_PLUGINS": ""} if request.param == "without our plugin" else imported
    assert "VLLM_PLUGINS" not in os.environ
    file = world / "report.json"
    run_script("serve", world, file, **variables)
    return json.loads(file.read_text())


def test_text_and_drafts_are_ours(report, world) -> None:
    reference = json.loads((world / "reference.json").read_text())
    assert report["None"]["tokens"] == reference["tokens"]
    assert report["chunked"]["tokens"] == reference["tokens"]
    assert report["eagle3_native"] == report["eagle3"]
    for name in [*SPECULATORS, *(["medusa"] if "medusa" in report else [])]:
        mine, expected = report[name], reference["counts"][name]
        ours = name == "medusa"
        assert mine["method"] == ("custom_class" if ours else name.partition("_")[0]), "our plugin leaves it to vLLM"
        assert mine["hooked"] == ours
        assert mine["tokens"] == report["None"]["tokens"], name
        assert expected["num_accepted_tokens"] > 0.05 * expected["num_draft_tokens"], (
            "drafts have to be right, and wrong"
        )
        assert expected["num_accepted_tokens"] < 0.95 * expected["num_draft_tokens"], (
            "drafts have to be right, and wrong"
        )
        for key in ("num_drafts", "num_accepted_tokens"):
            assert mine["counters"][key] == pytest.approx(expected[key], rel=0.01), (name, key)
        for accepted, wanted in zip(
            mine["counters"]["accepted_per_position"], expected["accepted_per_position"], strict=True
        ):
            assert accepted == pytest.approx(wanted, rel=0.01, abs=2), name
