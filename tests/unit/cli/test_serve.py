"""`verl-speculator serve` up to the point where vLLM starts."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from tests.unit.serving.conftest import HIDDEN, VOCAB
from verl_speculator import cli
from verl_speculator.cli import serve
from verl_speculator.serving import preflight


@pytest.fixture
def engine(monkeypatch) -> None:
    """As if vLLM 0.28 and this package's plugin were installed."""
    monkeypatch.setattr(preflight, "_is_importable", lambda package: True)
    monkeypatch.setattr(preflight, "_installed_version", lambda: "0.28.0")
    ours = EntryPoint("verl_speculator", "verl_speculator.serving.plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(preflight, "entry_points", lambda group: EntryPoints([ours]).select(group=group))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": HIDDEN, "vocab_size": VOCAB}))
    return str(folder)


def test_vllm_is_started_with_the_speculator(engine, base, make_speculator, monkeypatch, capsys) -> None:
    _, folder = make_speculator("mlp")
    started = []
    monkeypatch.setattr(serve, "_has_vllm_command", lambda: True)
    monkeypatch.setattr(serve.os, "execv", lambda program, arguments: started.append((program, arguments)))
    monkeypatch.chdir(folder.parent)
    options = ["--num-speculative-tokens", "2", "--port", "9000", "--dtype", "auto"]
    cli.main(["serve", base, "--speculator", "speculator", *options])
    ((program, arguments),) = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", base]
    assert json.loads(arguments[6]) == {"model": str(folder), "num_speculative_tokens": 2}
    assert arguments[5] == "--speculative-config"
    assert arguments[7:] == ["--port", "9000", "--dtype", "auto"]
    assert "curl http://localhost:9000/v1/chat/completions" in capsys.readouterr().out


def test_distribution_whose_vllm_command_fails(monkeypatch) -> None:
    monkeypatch.setattr(serve, "_has_vllm_command", lambda: False)
    line = serve.vllm_command("BASE", "owner/speculator", None, ["--port", "1"])
    assert line[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "BASE"]
    assert json.loads(line[6]) == {"model": "owner/speculator"}


def test_address_in_the_call() -> None:
    text = serve.how_to_call(
        "BASE", ["--host=0.0.0.0", "--port", "81", "--served-model-name", "tiny", "--api-key", "k"]
    )
    assert "curl http://localhost:81/v1/chat/completions" in text
    assert '"model": "tiny"' in text
    assert "Bearer API_KEY" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--speculator", "absent"], "--speculator: 'absent' is not a speculator"),
        (["--num-speculative-tokens", "9"], "num_speculative_tokens must be from 1"),
        (["--speculative-config", "{}"], "--speculative-config is set by --speculator: leave it out"),
    ],
)
def test_mistake_ends_before_vllm_starts(arguments, reason, engine, base, make_speculator, monkeypatch, capsys) -> None:
    _, folder = make_speculator("mlp")
    monkeypatch.setattr(serve.os, "execv", lambda *_: pytest.fail("started vLLM"))
    assert cli.main(["serve", base, "--speculator", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {reason}")
    assert len(captured.err.splitlines()) == 1


def test_speculator_of_another_base_model(engine, base, make_speculator, capsys) -> None:
    _, folder = make_speculator("mlp", input_hidden_dim=10)
    assert cli.main(["serve", base, "--speculator", str(folder)]) == 2
    assert f"hidden size 10 and the base model has {HIDDEN}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda m: m.setattr(preflight, "_is_importable", lambda package: False), "vLLM is not installed"),
        (lambda m: m.setattr(preflight, "_installed_version", lambda: "0.20.0"), "vLLM 0.20.0 is installed"),
        (
            lambda m: m.setattr(preflight, "entry_points", lambda group: EntryPoints()),
            "cannot find this package's plugin",
        ),
        (lambda m: m.setenv("VLLM_PLUGINS", "other"), "VLLM_PLUGINS=other keeps vLLM from loading this package"),
    ],
)
def test_engine_that_would_not_speculate(break_it, reason, engine, base, make_speculator, monkeypatch, capsys) -> None:
    _, folder = make_speculator("mlp")
    break_it(monkeypatch)
    assert cli.main(["serve", base, "--speculator", str(folder)]) == 2
    assert reason in capsys.readouterr().err


def test_a_base_with_a_broken_config_ends_in_one_sentence(engine, make_speculator, tmp_path, capsys) -> None:
    _, folder = make_speculator("mlp")
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["serve", str(tmp_path), "--speculator", str(folder), "--print-command"]) == 2
    assert re.fullmatch(r"error: BASE: '.*config\.json' is not valid JSON \(.*\)\n", capsys.readouterr().err)


def test_a_base_of_another_size_is_found_in_its_text_model_too(engine, make_speculator, tmp_path, capsys) -> None:
    _, folder = make_speculator("mlp")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": HIDDEN, "vocab_size": VOCAB + 1}}))
    assert cli.main(["serve", str(tmp_path), "--speculator", str(folder), "--print-command"]) == 2
    assert f"the base model has {VOCAB + 1}" in capsys.readouterr().err


def test_a_base_whose_sizes_only_vllm_knows_is_served(engine, make_speculator, tmp_path) -> None:
    _, folder = make_speculator("mlp")
    (tmp_path / "config.json").write_text('{"hidden_size": "8"}')
    for base in (str(tmp_path), "owner/hub-name"):
        assert cli.main(["serve", base, "--speculator", str(folder), "--print-command"]) == 0
