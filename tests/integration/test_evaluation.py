"""`verl-speculator eval` as a user runs it, its numbers counted again without our decoding, its page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.drafts import accepted_drafts, greedy_text, train_speculator
from tests.support.tiny import write_base_model, write_chats
from verl_speculator import cli
from verl_speculator.data.chats import read_chats
from verl_speculator.data.prompts import encode_chats
from verl_speculator.models import Speculator
from verl_speculator.models.serialization import find_folder
from verl_speculator.trainer.metrics_log import MetricsLog

MAX_NEW_TOKENS = 24
NUM_PROMPTS = 5
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.slow


class World(NamedTuple):
    base: Path
    data: Path
    run: Path
    report: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def world(tmp_path_factory, verl_speculator) -> World:
    folder = tmp_path_factory.mktemp("evaluation")
    base, data = write_base_model(folder / "base", seed=5), write_chats(folder / "chats.parquet", 8, seed=3)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [
        prompt.prompt_ids for prompt in encode_chats(read_chats([str(data)], "messages", NUM_PROMPTS), tokenizer)
    ]
    run = folder / "run"
    train_speculator(
        model, prompts, run / "global_step_60" / "speculator", n_predict=3, stop=tokenizer.eos_token_id, steps=60
    )
    log = MetricsLog(run, start_step=0)
    for step in range(1, 61):
        log.append(step, {"train/loss": 6.0 / step, "train/acceptance_length": 1 + step / 60, "val/loss": 5 / step})
    result = verl_speculator(
        "eval", "--base", str(base), "--speculator", str(run / "global_step_60"), "--data", str(data),
        "--num-prompts", str(NUM_PROMPTS), "--max-new-tokens", str(MAX_NEW_TOKENS), "--batch-size", "2",
        "--report", str(folder / "out"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return World(base, data, run, folder / "out", result.stdout, result.stderr)


@pytest.fixture(scope="module")
def values(world) -> dict:
    return json.loads((world.report / "eval.json").read_text())


def test_numbers_are_those_of_an_independent_count(world, values) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    speculator = Speculator.from_pretrained(world.run / "global_step_60")
    prompts = encode_chats(read_chats([str(world.data)], "messages", NUM_PROMPTS), tokenizer)
    rounds = []
    with torch.no_grad():
        for prompt, reported in zip(prompts, values["speculators"][0]["prompts"], strict=True):
            output = greedy_text(model, prompt.prompt_ids, MAX_NEW_TOKENS, tokenizer.eos_token_id)
            assert tokenizer.decode(output) == reported["text"]
            accepted = accepted_drafts(model, speculator, prompt.prompt_ids, output)
            assert reported["accepted_per_round"] == accepted
            rounds += accepted
    assert 0 < sum(rounds) < 3 * len(rounds), "the test wants drafts that are sometimes right"
    assert values["acceptance_length"]["mean"] == pytest.approx(1 + sum(rounds) / len(rounds))
    length = values["acceptance_length"]
    assert length["low"] < length["mean"] < length["high"]
    joint = [sum(accepted > i for accepted in rounds) / len(rounds) for i in range(3)]
    assert values["acceptance_per_position"] == pytest.approx(joint)
    assert values["accepted_lengths"]["counts"] == [rounds.count(length) for length in range(4)]
    assert values["identical_outputs"] is True
    assert values["num_prompts"] == NUM_PROMPTS
    batches = values["speedup_spread"]["per_batch"]
    assert len(batches) == 3, "five prompts, two at a time"
    assert values["speedup"] == sorted(batches)[1]
    tokens = sum(prompt["num_tokens"] for prompt in values["speculators"][0]["prompts"])
    assert values["target_forwards_saved"] == pytest.approx(1 - (len(rounds) + NUM_PROMPTS) / tokens)


def test_held_out_loss_is_the_models_own(world, values) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    total = count = 0
    for prompt in encode_chats(read_chats([str(world.data)], "messages", NUM_PROMPTS), tokenizer):
        input_ids = torch.tensor([prompt.prompt_ids + prompt.answer_ids])
        labels = input_ids.clone()
        labels[:, : len(prompt.prompt_ids)] = -100
        with torch.no_grad():
            total += model(input_ids=input_ids, labels=labels).loss.item() * len(prompt.answer_ids)
        count += len(prompt.answer_ids)
    assert values["target"]["held_out_tokens"] == count
    assert values["target"]["held_out_loss"] == pytest.approx(total / count, rel=1e-4)


def test_terminal_shows_table_and_progress(world) -> None:
    assert "acceptance length" in world.stdout
    assert "prompt lookup" in world.stdout
    assert str(world.report / "index.html") in world.stdout
    assert "Decoding: 100%" in world.stderr


def test_sampled_outputs_are_not_compared_and_no_report_is_written(world, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    status = cli.main(
        [
            *("eval", "--base", str(world.base), "--speculator", str(world.run / "global_step_60")),
            *("--data", str(world.data), "--num-prompts", "2", "--max-new-tokens", "8"),
            *("--temperature", "1", "--top-p", "0.9", "--draft-sampling", "random"),
        ]
    )
    output = capsys.readouterr().out
    assert status == 0
    assert "not compared (sampled)" in output
    assert "Add --report FOLDER" in output
    assert list(tmp_path.iterdir()) == []


def test_speculator_of_the_hub_on_data_with_a_chat_that_is_too_long(world, tmp_path, monkeypatch, capsys) -> None:
    import huggingface_hub

    folder = find_folder(world.run / "global_step_60")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(folder / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    rows = pq.read_table(world.data)["messages"].to_pylist()[:2]
    long = [{"role": "user", "content": "w1 " * 400}]
    pq.write_table(pa.table({"messages": [rows[0], long, rows[1]]}), tmp_path / "chats.parquet")
    status = cli.main(
        [
            *("eval", "--base", str(world.base), "--speculator", "owner/speculator"),
            *("--data", str(tmp_path / "chats.parquet"), "--max-new-tokens", "8", "--json", "-"),
        ]
    )
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert status == 0
    assert (values["num_prompts"], values["num_skipped"]) == (2, 1)
    assert [prompt["row"] for prompt in values["speculators"][0]["prompts"]] == [0, 2]
    assert values["speculators"][0]["label"] == "owner/speculator"
    assert re.search(r"note: 1 prompt \(.*chats.parquet', row 1\) is left out: too long", captured.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "250"], "error: --data: 5 prompts ("),
        (["--device", "nonsense"], "error: --device=nonsense cannot be used here"),
        (["--run-dir", "absent", "--report", "out"], "error: --run-dir: there is no folder or file 'absent'"),
    ],
)
def test_mistakes_that_are_found_late_are_one_line_too(
    world, capsys, tmp_path, monkeypatch, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--base", str(world.base), "--speculator", str(world.run / "global_step_60"), "--data", str(world.data)]
    assert cli.main(["eval", *base, "--num-prompts", "5", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_train_report_is_plotted_from_the_runs_own_log(world, tmp_path, capsys) -> None:
    assert cli.main(["train-report", str(world.run), "--output", str(tmp_path / "run.html")]) == 0
    assert str(tmp_path / "run.html") in capsys.readouterr().out
    assert len(re.findall(r"; stroke: var\(--s\d", (tmp_path / "run.html").read_text())) >= 3
    assert cli.main(["train-report", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no folder or file")


WIDTHS = (340, 390, 800)
FRAMES = """<!DOCTYPE html><body style="margin: 0">
<iframe width=1280 height=2400 style="border: 0" srcdoc="{page}"></iframe>
{phones}<p id=o></p><script>onload = () => {{
  o.textContent = JSON.stringify([...document.querySelectorAll(".phone")].map(f => {{
    const d = f.contentDocument.documentElement;
    const out = [...d.querySelectorAll("body *")].filter(e => !e.closest("svg, .scroll, pre") &&
      e.getBoundingClientRect().right > d.clientWidth + 1);
    return [d.clientWidth, d.scrollWidth, out.map(e => e.className || e.tagName)];
  }}));
}};</script>"""


class Drawn(NamedTuple):
    dom: str
    errors: str
    picture: Path


@pytest.fixture(scope="module")
def drawn(world, tmp_path_factory) -> dict[str, Drawn]:
    """The page as it is, and once more with frames of a phone's width below it, because no window is as narrow."""
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome on the PATH to render with")
    folder = tmp_path_factory.mktemp("browser")
    page = html.escape((world.report / "index.html").read_text())
    phones = [f'<iframe class="phone" width={w} height=900 style="border: 0" srcdoc="{page}"></iframe>' for w in WIDTHS]
    (folder / "frames.html").write_text(FRAMES.format(page=page, phones="".join(phones)))
    drawn = {}
    for scheme, number, file in (("dark", 0, world.report / "index.html"), ("light", 1, folder / "frames.html")):
        picture = folder / f"{scheme}.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        options += [f"--blink-settings=preferredColorScheme={number}", "--window-size=1280,2400"]
        command = [BROWSER, *options, f"--screenshot={picture}", "--dump-dom", file.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        drawn[scheme] = Drawn(result.stdout, result.stderr, picture)
    return drawn


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_browser_draws_the_page(drawn, scheme) -> None:
    assert "CONSOLE" not in drawn[scheme].errors
    with Image.open(drawn[scheme].picture) as image:
        assert image.size == (1280, 2400)
        colours = sorted(image.convert("RGB").getcolors(maxcolors=1 << 20), reverse=True)
    assert len(colours) > 200
    assert colours[0][0] < 0.9 * 1280 * 2400, "hardly anything is drawn"
    background = sum(colours[0][1])
    assert background < 150 if scheme == "dark" else background > 650


def test_browser_reads_the_title_and_the_sections(drawn) -> None:
    dom = drawn["dark"].dom
    assert "<title>Speculator report: run step 60</title>" in dom
    headings = re.findall("<h2>(.*?)</h2>", dom)
    assert headings == [
        "Tokens per forward pass of the target", "Speed", "All numbers", "The target itself", "Training",
        "Best and worst prompts",
    ]  # fmt: skip
    assert dom.count('<svg class="chart"') >= 8
    assert "display:none" not in dom


def test_nothing_sticks_out_of_a_phone(drawn) -> None:
    found = re.search(r'<p id="o">(.*)</p>', drawn["light"].dom)
    assert json.loads(found[1]) == [[width, width, []] for width in WIDTHS]
