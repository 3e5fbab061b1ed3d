"""Speculators in a real vLLM on CPU: the same tokens as without, the acceptance that decoding in torch has."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import REPOSITORY
from tests.support.tiny import write_chats
from verl_speculator.errors import ConfigError
from verl_speculator.serving.options import check_options, read_options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

SPECULATORS = ("mlp", "mlp_untied_scaled", "rnn_drafts", "rnn_untied_dotted", "lstm", "lstm_tied_embeddings_dotted")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), **more}


def run_script(name: str, *arguments: str | Path, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_script("serving_world.py", folder)
    return folder


@pytest.fixture(scope="module")
def report(world: Path) -> dict[str, Any]:
    run_script("serving_in_process.py", world, world / "report.json")
    return json.loads((world / "report.json").read_text())


@pytest.fixture(scope="module")
def reference(world: Path) -> dict[str, Any]:
    return json.loads((world / "reference.json").read_text())


def test_entry_point() -> None:
    (ours,) = entry_points(group="vllm.general_plugins", name="verl_speculator")
    assert ours.value == "verl_speculator.serving.plugin:register"


def test_vllm_is_left_alone_without_a_speculator(report, reference) -> None:
    assert not report["none"]["runner_hooked"]
    assert report["mlp"]["runner_hooked"]
    assert report["none"]["counters"] == {}
    assert [answer["tokens"] for answer in report["none"]["greedy"]] == reference["tokens"]


@pytest.mark.parametrize("name", [*SPECULATORS, "ibm", "arctic"])
def test_greedy_tokens_are_those_without_a_speculator(name: str, report) -> None:
    for mine, plain in zip(report[name]["greedy"], report["none"]["greedy"], strict=True):
        assert mine["tokens"] == plain["tokens"]


@pytest.mark.parametrize("name", SPECULATORS)
def test_requests_that_end_early_or_change_their_logits(name: str, report) -> None:
    plain = report["none"]["mixed"]
    assert {answer["finish_reason"] for answer in plain} == {"stop", "length"}
    for mine, other in zip(report[name]["mixed"], plain, strict=True):
        logprobs, other_logprobs = mine.pop("logprobs"), other["logprobs"]
        assert mine == {key: value for key, value in other.items() if key != "logprobs"}
        assert (logprobs is None) == (other_logprobs is None)
        for (value, rank), (other_value, other_rank) in zip(logprobs or [], other_logprobs or [], strict=True):
            assert rank == other_rank
            assert value == pytest.approx(other_value, abs=1e-4)


def test_a_request_near_the_longest_text_stops_nobody_elses_drafts(report) -> None:
    drafts = report["lstm"]["near_the_end"]
    assert drafts["both"] == drafts["end"] + drafts["other"]


def test_requests_with_a_lora_adapter(report) -> None:
    plain, drafted = report["lora"]["none"], report["lora"]["lstm"]
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["counters"]["num_accepted_tokens"] > 0
    without = [answer["tokens"][:40] for answer in report["none"]["greedy"]]
    changed = [tokens != other for tokens, other in zip(plain["tokens"], without, strict=True)]
    assert all(changed[1::2]), "the adapter changes what the base says"


def test_structured_output_is_obeyed(report) -> None:
    choice, pattern = report["lstm"]["mixed"][-3], report["lstm"]["mixed"][-2]
    assert choice["text"] in ("w1 w2 w3 w4", "w1 w2 w30", "no w12")
    assert pattern["text"].startswith(("yes w", "no w"))
    assert pattern["finish_reason"] == "length" or pattern["text"].endswith(" end")


@pytest.mark.parametrize("name", SPECULATORS)
def test_acceptance_is_that_of_decoding_in_torch(name: str, report, reference) -> None:
    mine, expected = report[name]["counters"], reference["counts"][name]
    assert expected["num_accepted_tokens"] > 0.2 * expected["num_draft_tokens"], "the test needs drafts that are right"
    assert mine["num_drafts"] == pytest.approx(expected["num_drafts"], rel=0.01)
    length, expected_length = (1 + c["num_accepted_tokens"] / c["num_drafts"] for c in (mine, expected))
    assert length == pytest.approx(expected_length, rel=0.01)
    for position, accepted in enumerate(expected["accepted_per_position"]):
        assert mine["accepted_per_position"][position] == pytest.approx(accepted, rel=0.01, abs=2)


def test_exported_folders_draft_the_same(report) -> None:
    assert report["ibm"]["counters"] == report["mlp_untied_scaled"]["counters"]
    fewer, all_heads = report["arctic"]["counters"], report["mlp"]["counters"]
    assert fewer["num_draft_tokens"] == 2 * fewer["num_drafts"]
    assert fewer["accepted_per_position"][0] >= all_heads["accepted_per_position"][0], "fewer drafts, so more rounds"


@pytest.mark.parametrize("rule", ["scorer", "accept-all"])
def test_a_rule_answers_as_in_decoding_in_torch(rule: str, report, world) -> None:
    served, expected = report[f"lossy {rule}"], json.loads((world / "lossy.json").read_text())
    mine = expected["rules"][rule]
    assert [answer["tokens"] for answer in served["lossy"]] == mine["tokens"]
    assert mine["tokens"] != expected["rules"]["strict"]["tokens"]
    assert [answer["tokens"] for answer in served["strict"]] == expected["rules"]["strict"]["tokens"]
    # A round may go past the end of its text, of which our own count knows nothing.
    beyond = 3 * len(mine["tokens"])
    assert mine["lossy_accepted"] <= served["counters"]["lossy_accepted"] <= mine["lossy_accepted"] + beyond
    assert served["counters"]["num_accepted_tokens"] > served["counters"]["lossy_accepted"]


def test_a_rule_is_asked_and_does_not_accept_everything(world) -> None:
    rules = json.loads((world / "lossy.json").read_text())["rules"]
    assert 10 < rules["scorer"]["lossy_accepted"] < 0.8 * rules["accept-all"]["lossy_accepted"]


def test_a_rule_overrides_no_stop_token(report, world) -> None:
    expected = json.loads((world / "lossy.json").read_text())
    assert expected["stop"] in [answer["stop_reason"] for answer in report["lossy accept-all"]["lossy"]]


def test_what_a_rule_refuses_can_be_had_losslessly(report) -> None:
    served = report["lossy scorer"]
    assert len(served["logprobs"][0]["logprobs"]) == 4
    counters = served["strict_counters"]
    assert counters["after"]["lossy_accepted"] == counters["before"]["lossy_accepted"]
    for name, sentence in served["refused"].items():
        assert f"{name}=" in sentence
        assert "cannot be had with this server's acceptance rule, which is lossy" in sentence


def test_compiled_base_and_speculator(report) -> None:
    compiled = report["compiled"]
    assert compiled["mode"] not in ("NONE", "0")
    assert [answer["tokens"] for answer in compiled["greedy"]] == [a["tokens"] for a in report["none"]["greedy"]]
    assert compiled["counters"] == report["lstm"]["counters"]


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_sampled_tokens_have_the_base_models_distribution(name: str, report, world) -> None:
    """Pearson's test of whole sequences against their exact probabilities, at five standard deviations."""
    exact = exact_distribution(world, json.loads((world / "prompts.json").read_text())[1])
    drawn = Counter(tuple(sequence) for sequence in report[name]["sampled"])
    total = sum(drawn.values())
    assert set(drawn) <= set(exact), "a sequence that top-k excludes was sampled"
    assert report[name]["counters_sampled"]["num_accepted_tokens"] > 0.05 * total, "drafts are accepted here"
    common = [sequence for sequence, p in exact.items() if p * total >= 5]
    rest = total - sum(drawn[sequence] for sequence in common)
    rest_expected = total - sum(exact[sequence] * total for sequence in common)
    cells = [(drawn[sequence], exact[sequence] * total) for sequence in common] + [(rest, rest_expected)]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    assert freedom >= 8
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_in_bfloat16_the_distribution_is_that_without_a_speculator(report) -> None:
    """Pearson's test of two samples of the same size; where tokens are so close, no third party's numbers tell more."""
    with_drafts, without = (Counter(map(tuple, report["bfloat16"][name])) for name in ("lstm", "none"))
    assert report["bfloat16"]["counters"]["num_accepted_tokens"] > 0.05 * with_drafts.total()
    both = with_drafts + without
    cells = [(with_drafts[sequence], without[sequence]) for sequence, count in both.items() if count >= 10]
    cells.append((with_drafts.total() - sum(a for a, _ in cells), without.total() - sum(b for _, b in cells)))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells if a + b)
    freedom = len(cells) - 1
    assert freedom >= 8
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def exact_distribution(world: Path, prompt: list[int]) -> dict[tuple[int, ...], float]:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.integration import serving_sampling as sampling

    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).eval()
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(sampling.TOKENS):
        sequences = list(found)
        with torch.no_grad():
            logits = base(torch.tensor([prompt + list(sequence) for sequence in sequences])).logits[:, -1]
        values, tokens = (logits / sampling.TEMPERATURE).topk(sampling.TOP_K)
        probabilities = values.softmax(-1)
        found = {
            (*sequence, int(tokens[row, i])): found[sequence] * float(probabilities[row, i])
            for (row, sequence), i in product(enumerate(sequences), range(sampling.TOP_K))
        }
    return found


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("good", "no error"),
        ("too_many", "num_speculative_tokens must be from 1 to the speculator's n_predict (3), not 4."),
        ("hidden", "trained for hidden size 32 and the base model has 64"),
        ("vocabulary", "trained for vocabulary size 100 and the base model has 384"),
        ("broken_config", "is not usable: n_predict must be a positive integer, not 0."),
        ("no_effect", "draft_sample_method has no effect on the speculator"),
        ("pipeline", "pipeline_parallel_size must be 1 with a speculator of verl_speculator"),
        ("lossy_unsaid", "accept='accept-all' changes what the base model says: set \"lossy\": true beside it."),
        ("lossy_alone", 'lossy needs accept beside it, an acceptance rule such as "scorer:FOLDER".'),
        ("no_rule", "accept: 'acept-all' is no acceptance rule; 'accept-all' is"),
        ("no_scorer", "has no config.json: it holds no scorer"),
        ("synthetic", "rejection_sample_method='synthetic' must be left out with accept."),
        ("not_ours", "accept and lossy need a speculator of verl_speculator as the model of the speculative config."),
        ("old_engine", "but vLLM 0.27.1 is installed: install vllm>=0.28."),
        ("no_custom_class", "its SpeculativeConfig has no method 'custom_class' any more"),
        ("runner_moved", "has no parameter sample_hidden_states any more"),
    ],
)
def test_mistake_ends_in_one_sentence(case: str, sentence: str, report) -> None:
    assert sentence in report["errors"][case]


def test_no_option_of_vllm_brings_another_speculator(monkeypatch, capsys) -> None:
    """All beginnings of names that could mean the speculative configuration, plain and dotted, as vLLM reads them."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    ours = {"model": "ours"}
    names = {name for action in parser._actions for name in action.option_strings if name.lstrip("-")[0] == "s"}
    assert {"--speculative-config", "-sc", "--spec-method", "--specialize-active-lora"} <= names
    spellings = {name[:length] for name in names for length in range(2, len(name) + 1)} - {"--"}
    replaced, refused = set(), set()
    for name, (key, value) in product(sorted(spellings), (("", '{"method": "ngram"}'), (".method", "ngram"))):
        given = [name + key, value]
        try:
            check_options(read_options(given))
        except ConfigError:
            refused.add(name + key)
        try:
            parsed = parser.parse_args(["--speculative-config", json.dumps(ours), *given])
        except (SystemExit, ValueError):
            continue  # vLLM refuses it itself
        if parsed.speculative_config != ours or parsed.spec_method or parsed.spec_model or parsed.spec_tokens:
            replaced.add(name + key)
    assert {"--speculative-config.method", "-sc.method", "-s", "--speculative", "--spec-mo"} <= replaced
    assert replaced <= refused
    assert not {name for name in refused if name.startswith("--specialize")}


def test_mixed_requests_with_little_memory(world) -> None:
    """Aborts, early stops, structured output, chunked prefill, prefix caching and preemption, all at once."""
    run_script("serving_mixed.py", world, world / "mixed.json")
    report = json.loads((world / "mixed.json").read_text())
    plain, drafted = report["none"], report["lstm"]
    assert plain["preemptions"] >= 5
    assert drafted["preemptions"] >= 5
    assert drafted["counters"]["num_accepted_tokens"] > 500
    assert plain["tokens"].keys() == drafted["tokens"].keys()
    for name, tokens in plain["tokens"].items():
        mine = drafted["tokens"][name]
        if name in report["limits"]:  # a step with drafts may bring it further before it is aborted
            least = min(len(tokens), len(mine))
            assert mine[:least] == tokens[:least], name
        else:
            assert mine == tokens, name


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    """`verl-speculator serve` as a user starts it, on two tensor-parallel ranks; yields its address and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    serve = [sys.executable, "-m", "verl_speculator.cli", "serve", str(world / "base")]
    arguments = ["--speculator", str(world / "lstm" / "global_step_60"), "--host", "127.0.0.1", "--port", str(port)]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--tensor-parallel-size", "2"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*serve, *arguments, *options, "--served-model-name", "tiny"],
            stdout=output,
            stderr=subprocess.STDOUT,
            # Two ranks on a machine with a single NUMA node, and a vocabulary matrix in shards although it is small.
            env=environment(VLLM_CPU_OMP_THREADS_BIND="nobind", VERL_SPECULATOR_SHARD_FROM_MIB="0"),
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(address, process, log)
        yield address, log
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(2400):
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"the server did not start: {log.read_text()[-6000:]}")


def test_server_with_the_openai_client(server, world, reference) -> None:
    import openai

    address, log = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    prompts = json.loads((world / "prompts.json").read_text())
    extra = {"ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=100, temperature=0, extra_body=extra)
    assert [choice.token_ids for choice in answer.choices] == reference["tokens"]
    counters, expected = server_counters(address), reference["counts"]["lstm"]
    for name in ("num_drafts", "num_accepted_tokens"):
        assert counters[name] == pytest.approx(expected[name], rel=0.01)

    chat = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**chat).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat, stream=True)]
    assert whole == "".join(parts)
    assert len(whole) > 0

    text = log.read_text()
    [command] = [line for line in text.splitlines() if line.startswith("curl ") and "/v1/chat/completions" in line]
    called = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(called.stdout)["usage"]["completion_tokens"] > 1
    drafting = [line for line in text.splitlines() if "Drafting with the ArcticLSTMSpeculator" in line]
    assert len(drafting) == 2, "each rank drafts"
    assert all("vocabulary matrix in 2 shards" in line for line in drafting)


def server_counters(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics") as page:
        lines = page.read().decode().splitlines()
    totals = [line for line in lines if line.startswith("vllm:spec_decode_") and "_per_pos" not in line]
    return {line.partition("{")[0][17:].removesuffix("_total"): float(line.split()[-1]) for line in totals}


QUESTION = "w1 w2 w3"


def run_example(file: str, address: str) -> tuple[str, dict[str, float]]:
    """What an example client printed, and by how much the server's counters rose meanwhile."""
    script = REPOSITORY / "examples" / "serving" / file
    program = [sys.executable] if file.endswith(".py") else ["bash"]
    before = server_counters(address)
    result = subprocess.run(
        [*program, str(script), address, QUESTION],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, {name: total - before[name] for name, total in server_counters(address).items()}


def answer_of(address: str) -> tuple[str, int]:
    """The text and the tokens of the server's greedy answer to the question."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=128, temperature=0)
    return answer.choices[0].message.content, answer.usage.completion_tokens


def test_example_client_in_python(server) -> None:
    address, _ = server
    text, tokens = answer_of(address)
    printed, counted = run_example("client.py", address)
    assert 0 < counted["num_accepted_tokens"] < counted["num_draft_tokens"]
    drafts, accepted, drafted = (counted[f"num_{name}"] for name in ("drafts", "accepted_tokens", "draft_tokens"))
    assert printed.startswith(f"{text}\n\n{tokens} tokens in ")
    assert f"\n{drafts:.0f} drafts, {accepted:.0f} of {drafted:.0f} drafted tokens accepted\n" in printed
    assert printed.endswith(f"\n{1 + accepted / drafts:.2f} tokens per step of the base model\n")


def test_example_client_with_curl(server) -> None:
    address, _ = server
    text, tokens = answer_of(address)
    printed, counted = run_example("curl.sh", address)
    answer, *counters = printed.splitlines()
    assert json.loads(answer)["choices"][0]["message"]["content"] == text
    assert json.loads(answer)["usage"]["completion_tokens"] == tokens
    assert counted["num_drafts"] > 0
    totals = server_counters(address)
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        [line] = [line for line in counters if line.startswith(f"vllm:spec_decode_{name}_total{{")]
        assert float(line.split()[-1]) == totals[name]


def test_load_test_of_a_running_server(server, world, tmp_path) -> None:
    address, _ = server
    chats = write_chats(tmp_path / "chats.parquet", 6)
    before = server_counters(address)
    load = ["--url", address, "--requests", "6", "--concurrency", "2", "--max-tokens", "16"]
    result = subprocess.run(
        [sys.executable, "-m", "verl_speculator.cli", "bench", "--base", str(world / "base"), "--data", str(chats),
         *load, "--output", str(tmp_path / "load")],
        env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads((tmp_path / "load" / "load.json").read_text())["results"]
    assert (measured["name"], measured["drafts"], measured["concurrency"]) == (address, None, 2)
    assert 0 < measured["ttft_p50"] <= measured["ttft_p99"]
    assert 0 < measured["tpot_p50"] <= measured["tpot_p99"]
    assert measured["tokens_per_second"] > 0
    # Those of the round that warms up, too.
    counted = {name: total - before[name] for name, total in server_counters(address).items()}
    assert measured["acceptance_length"] == pytest.approx(
        1 + counted["num_accepted_tokens"] / counted["num_drafts"], rel=0.05
    )
    assert f"{measured['acceptance_length']:.2f}" in result.stdout
