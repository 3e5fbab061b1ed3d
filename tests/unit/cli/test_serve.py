"""`verl-speculator serve` up to the point where vLLM starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from importlib.metadata import EntryPoints

import pytest

from tests.unit.serving.conftest import HIDDEN, VOCAB
from verl_speculator import cli
from verl_speculator.cli import serve
from verl_speculator.serving import preflight
from verl_speculator.serving.options import read_options


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
    assert arguments[7:] == ["--port", "9000", "--dtype", "auto", "--host", "127.0.0.1"]
    assert "curl http://localhost:9000/v1/chat/completions" in capsys.readouterr().out


def test_distribution_whose_vllm_command_fails(monkeypatch) -> None:
    monkeypatch.setattr(serve, "_has_vllm_command", lambda: False)
    line = serve.vllm_command("BASE", "owner/speculator", None, ["--port", "1"])
    assert line[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "BASE"]
    assert json.loads(line[6]) == {"model": "owner/speculator"}


def test_address_in_the_call(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def call(*rest: str) -> str:
        return serve.how_to_call("BASE", read_options(rest))

    text = call("--host=0.0.0.0", "--port", "81", "--served_model_name", "tiny", "other", "--api-key", "secret")
    assert "curl http://localhost:81/v1/chat/completions" in text
    assert '"model": "tiny"' in text
    assert "Bearer $VLLM_API_KEY" in text
    assert "secret" not in text
    assert "curl http://localhost:8000/v1" in call()
    assert "curl http://127.0.0.1:8000/v1" in call("--host", "127.0.0.1")
    assert "curl http://10.1.2.3:8000/v1" in call("--host", "10.1.2.3")
    assert "curl http://[fd00::1]:8000/v1" in call("--host", "fd00::1")
    assert "Bearer" not in call()
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert "Bearer $VLLM_API_KEY" in call()
    assert "secret" not in call()


@pytest.fixture
def printed(engine, base, make_speculator, capsys):
    """The arguments of the command that `serve --print-command` prints, after the base's name."""
    _, folder = make_speculator("mlp")

    def run(*rest: str) -> list[str]:
        assert cli.main(["serve", *rest, "--speculator", str(folder), "--print-command"]) == 0, capsys.readouterr().err
        line = shlex.split(capsys.readouterr().out)
        assert line[line.index("--speculative-config") - 1] == base
        return line[line.index("--speculative-config") + 2 :]

    return run


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "8000"],
        ["--port=8000"],
        ["--enforce-eager"],
        ["--port", "8000", "--enforce-eager"],
        ["--enforce-eager", "--max-logprobs", "-1"],
        ["--tokenizer", "owner/tokenizer", "--port", "8000"],
    ],
)
def test_options_may_stand_before_the_base(options, printed, base) -> None:
    local = ["--host", "127.0.0.1"]
    assert printed(*options, base) == [*options, *local]
    assert printed(base, *options) == [*options, *local]
    assert printed("--base", base, *options) == [*options, *local]
    assert printed(options[0], *options[1:], base, "--seed", "1") == [*options, "--seed", "1", *local]


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ([], "BASE, the base model's folder or name, is missing"),
        (["--port", "8000"], "BASE, the base model's folder or name, is missing"),
        (["--enforce-eager"], "BASE, the base model's folder or name, is missing"),
        (["--api-key", "a", "b", "c"], "BASE, the base model's folder or name, cannot be told"),
        (
            ["--tokenizer", "owner/one", "--enforce-eager", "owner/two"],
            "BASE, the base model's folder or name, cannot be told from the values of options: put it before them",
        ),
    ],
)
def test_a_base_that_cannot_be_told_is_asked_for(rest, reason, engine, make_speculator, capsys) -> None:
    _, folder = make_speculator("mlp")
    assert cli.main(["serve", "--speculator", str(folder), *rest]) == 2
    assert capsys.readouterr().err.startswith(f"error: {reason}")


@pytest.mark.parametrize(
    "given", [["--host", "0.0.0.0"], ["--host=::"], ["--hos", "10.0.0.1"], ["--uds", "server.sock"]]
)
def test_others_are_let_in_only_when_asked_for(given, printed, base) -> None:
    assert printed(base) == ["--host", "127.0.0.1"]
    assert printed(base, *given) == given


def test_a_file_of_options_may_name_the_host(printed, base, tmp_path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("host: 0.0.0.0\nport: 81\n")
    assert printed(base, "--config", str(file)) == ["--config", str(file)]
    file.write_text("port: 81\n")
    assert printed(base, "--config", str(file)) == ["--config", str(file), "--host", "127.0.0.1"]


@pytest.mark.parametrize(
    "options",
    [
        ["--api-key", "sesame"],
        ["--api-key=sesame"],
        ["--api_key", "sesame"],
        ["--api-k=sesame"],
        ["--api-key", "sesame", "sesame-2"],
        ["--hf-token", "sesame"],
        ["--hf_token=sesame"],
        ["--ssl-keyfile-password=sesame"],
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_secrets_are_never_shown(options, before, engine, base, make_speculator, monkeypatch, capfd) -> None:
    _, folder = make_speculator("mlp")
    started = []
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.setattr(serve.os, "execv", lambda program, arguments: started.append(arguments))
    rest = [*options, "--port", "8000", base] if before else [base, *options]
    assert cli.main(["serve", *rest, "--speculator", str(folder)]) == 0
    captured = capfd.readouterr()
    assert "sesame" not in captured.out + captured.err
    assert "***" in captured.out
    assert len(started) == 1


@pytest.mark.parametrize("options", [["--api-key", "new"], ["--api-key=new"], ["--api_key", "new"]])
def test_vllm_gets_the_key_where_nobody_can_read_it(
    options, engine, base, make_speculator, monkeypatch, capsys
) -> None:
    """vLLM writes its command line to its log."""
    _, folder = make_speculator("mlp")
    started = []
    monkeypatch.setenv("VLLM_API_KEY", "old")
    monkeypatch.setattr(serve.os, "execv", lambda program, arguments: started.append(arguments))
    cli.main(["serve", base, *options, "--seed", "1", "--speculator", str(folder)])
    assert serve.os.environ["VLLM_API_KEY"] == "new"
    assert started[0][-4:] == ["--seed", "1", "--host", "127.0.0.1"]
    assert "new" not in " ".join(started[0])


def test_a_rule_is_served_loudly(engine, base, make_speculator, monkeypatch, capsys, tmp_path) -> None:
    _, folder = make_speculator("mlp")
    scorer = tmp_path / "scorer"
    scorer.mkdir()
    (scorer / "config.json").write_text(json.dumps({"model_type": "spd_scorer", "hidden_size": HIDDEN}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    started = []
    monkeypatch.setattr(serve.os, "execv", lambda program, arguments: started.append(arguments))
    assert cli.main(["serve", base, "--speculator", str(folder), "--accept", "scorer:scorer@0.7"]) == 0
    (command,) = started
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {"model": str(folder), "accept": f"scorer:{scorer}@0.7", "lossy": True}
    assert f"LOSSY: scorer:{scorer}@0.7 keeps drafts that the base model would not" in capsys.readouterr().out
    assert os.path.isdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--accept", "scorer:absent"], "--accept: "),
        (["--accept", "top-q:3"], "--accept: 'top-q:3' is no acceptance rule"),
        (["--speculator", "absent"], "--speculator: 'absent' is not a speculator"),
        (["--num-speculative-tokens", "9"], "num_speculative_tokens must be from 1"),
        (["--speculative-config", "{}"], "--speculative-config is set by --speculator: leave it out"),
        (["--speculative-config={}"], "--speculative-config is set by --speculator: leave it out"),
        (["--speculative_config", "{}"], "--speculative_config is set by --speculator: leave it out"),
        (["--speculative-config.method", "ngram"], "--speculative-config.method is set by --speculator"),
        (["--speculative_config.method=ngram"], "--speculative_config.method is set by --speculator"),
        (["--speculative-c", "{}"], "--speculative-c is set by --speculator"),
        (["--speculative.method", "ngram"], "--speculative.method is set by --speculator"),
        (["--spec.method", "ngram"], "--spec.method is set by --speculator"),
        (["-sc", "{}"], "-sc is vLLM's --speculative-config, set by --speculator"),
        (["-sc={}"], "-sc is vLLM's --speculative-config, set by --speculator"),
        (["-sc.method", "ngram"], "-sc.method is vLLM's --speculative-config, set by --speculator"),
        (["-s.method=ngram"], "-s.method is vLLM's --speculative-config, set by --speculator"),
        (["--spec-method", "ngram"], "--spec-method is set by --speculator"),
        (["--spec-model=x"], "--spec-model is set by --speculator"),
        (["--spec_tokens", "3"], "--spec_tokens is set by --speculator"),
        (["--model", "other"], "--model is set by BASE: leave it out"),
        (["--config", "absent.yaml"], "--config: there is no file 'absent.yaml'"),
    ],
)
def test_mistake_ends_before_vllm_starts(arguments, reason, engine, base, make_speculator, monkeypatch, capsys) -> None:
    _, folder = make_speculator("mlp")
    monkeypatch.setattr(serve.os, "execv", lambda *_: pytest.fail("started vLLM"))
    assert cli.main(["serve", base, "--speculator", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {reason}")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("speculative-config:\n  method: ngram\n", "speculative-config in "),
        ("speculative_config.method: ngram\n", "speculative_config.method in "),
        ("spec-method: ngram\n", "spec-method in "),
        ("- port\n", "--config: "),
        ("port: [", "--config: "),
    ],
)
def test_a_file_of_options_cannot_bring_another_speculator(
    text, reason, engine, base, make_speculator, tmp_path, capsys
) -> None:
    _, folder = make_speculator("mlp")
    (tmp_path / "vllm.yaml").write_text(text)
    assert cli.main(["serve", base, "--speculator", str(folder), "--config", str(tmp_path / "vllm.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {reason}")


def test_names_that_only_look_alike_are_vllms(printed, base) -> None:
    options = ["--specialize-active-lora", "--seed", "1", "--model-impl", "vllm", "--stream-interval", "2"]
    assert printed(base, *options) == [*options, "--host", "127.0.0.1"]


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
