"""`verl-speculator bench` and `serve --tune` up to the point where a server is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving.conftest import HEADS
from verl_speculator import cli
from verl_speculator.evaluation import load
from verl_speculator.evaluation.load_results import LoadResult


@pytest.fixture
def servers(monkeypatch) -> list[list[str]]:
    """Commands of the servers that were started; each answers the faster, the more it drafts."""
    started: list[list[str]] = []

    class Server:
        def __init__(self, command: list[str], log: Path) -> None:
            started.append(command)

        def __enter__(self) -> str:
            return "http://server"

        def __exit__(self, *_: object) -> None: ...

    def put_under_load(name: str, drafts: int | None, url: str, *_: Any) -> list[LoadResult]:
        level = len(started)
        return [
            LoadResult(name, drafts, at, 10.0 * level / (at if level > 2 else 1), 1, 1, 1, 1, None) for at in (1, 8)
        ]

    monkeypatch.setattr(load, "Server", Server)
    monkeypatch.setattr(load, "put_under_load", put_under_load)
    monkeypatch.setattr(load, "write_prompts", lambda *_: Path("prompts.jsonl"))
    return started


def speculative_config(command: list[str]) -> dict[str, Any] | None:
    return json.loads(command[command.index("--speculative-config") + 1]) if "--speculative-config" in command else None


def test_without_and_with_the_speculator(engine, servers, base, make_speculator, chat_data, tmp_path, capsys) -> None:
    _, folder = make_speculator("mlp")
    given = [
        "--base",
        base,
        "--speculator",
        str(folder),
        "--data",
        str(chat_data.val),
        "--output",
        str(tmp_path / "load"),
    ]
    assert cli.main(["bench", *given, "--dtype", "float32", "--concurrency", "1", "8"]) == 0
    assert [speculative_config(command) for command in servers] == [None, {"model": str(folder)}]
    assert all(command[-2:] == ["--dtype", "float32"] for command in servers)
    assert "no speculator" in capsys.readouterr().out
    settings = json.loads((tmp_path / "load" / "load.json").read_text())["settings"]
    assert settings["vllm_options"] == "--dtype float32"


def test_servers_that_run_already(servers, base, chat_data, capsys) -> None:
    urls = ["--url", "http://one:1/", "--url", "http://two:2"]
    assert cli.main(["bench", "--base", base, "--data", str(chat_data.val), *urls]) == 0
    assert servers == []
    out = capsys.readouterr().out
    assert "http://one:1/" in out
    assert "http://two:2" in out


def test_tuning_prints_the_schedule(engine, servers, base, make_speculator, chat_data, capsys) -> None:
    _, folder = make_speculator("mlp")
    arguments = [base, "--speculator", str(folder), "--tune", "--data", str(chat_data.val), "--dtype", "float32"]
    assert cli.main(["serve", *arguments]) == 0
    drafts = [(speculative_config(command) or {}).get("num_speculative_tokens") for command in servers]
    assert drafts == [None, *range(1, HEADS + 1)]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"Serve with: --draft-schedule '[[1, 7, {HEADS}], [8, 8, 1]]'"


def test_schedule_goes_to_vllm(engine, base, make_speculator, capsys) -> None:
    _, folder = make_speculator("mlp")
    options = ["--draft-schedule", "[[1, 7, 3], [8, 8, 1]]", "--print-command"]
    assert cli.main(["serve", base, "--speculator", str(folder), *options]) == 0
    assert '"num_speculative_tokens_per_batch_size": [[1, 7, 3], [8, 8, 1]]' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --speculator, to serve with it and without, or --url"),
        (["--url", "http://x", "--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        (["--url", "http://x", "--requests", "0"], "--requests must be at least 1, got 0"),
        (["--url", "http://x", "--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--url", "http://127.0.0.1:9"], "--url: no server of an OpenAI-compatible API answers at http://127.0.0.1:9"),
    ],
)
def test_mistakes(arguments, sentence, base_model, chat_data, capsys) -> None:
    assert cli.main(["bench", "--base", str(base_model), "--data", str(chat_data.val), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tune"], "--tune needs --data"),
        (["--draft-schedule", "[1, 2]"], "--draft-schedule must be a JSON list of [first, last, drafts], not '[1, 2]'"),
        (["--draft-schedule", "3"], "--draft-schedule must be a JSON list"),
    ],
)
def test_mistakes_of_serve(options, sentence, engine, base, make_speculator, capsys) -> None:
    _, folder = make_speculator("mlp")
    assert cli.main(["serve", base, "--speculator", str(folder), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
