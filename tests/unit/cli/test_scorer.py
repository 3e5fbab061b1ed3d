"""`verl-speculator scorer ...` and `eval --accept`, from prompts to a page, on models that know nothing."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.tiny import write_base_model, write_chats
from tests.unit.decoding.support import build_speculator
from verl_speculator import cli
from verl_speculator.scorer.windows import read_windows

PATTERN = r"(\S+)\s*$"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target, a draft that is the target with noise, a speculator, and questions."""
    folder = tmp_path_factory.mktemp("scorer")
    write_base_model(folder / "base", seed=5, tie=False)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    build_speculator("mlp", model).save_pretrained(folder / "speculator")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    write_base_model(folder / "draft", seed=5, tie=False)
    model.save_pretrained(folder / "draft")
    write_chats(folder / "chats.parquet", 10, seed=1)
    chats = pq.read_table(folder / "chats.parquet")
    answers = pa.array([str(row) for row in range(chats.num_rows)])
    pq.write_table(chats.append_column("answer", answers), folder / "questions.parquet")
    return folder


@pytest.fixture(scope="module")
def models(world):
    return [
        *("--base", str(world / "base"), "--draft", str(world / "draft"), "--answers", "answer", "--num-drafts", "3"),
        *("--max-new-tokens", "12", "--batch-size", "4", "--answer-pattern", PATTERN),
    ]


@pytest.fixture(scope="module")
def scorer(world, models):
    data = ["--data", str(world / "questions.parquet")]
    windows, labelled = str(world / "windows.parquet"), str(world / "labelled.parquet")
    assert cli.main(["scorer", "data", *models, *data, "--output", windows]) == 0
    label = ["--base", str(world / "base"), "--windows", windows, "--output", labelled, "--answer-pattern", PATTERN]
    assert cli.main(["scorer", "label", *label]) == 0
    fit = ["--base", str(world / "base"), "--windows", labelled, "--epochs", "2", "--inner-dim", "8"]
    assert cli.main(["scorer", "fit", *fit, "--output", str(world / "head")]) == 0
    assert cli.main(["scorer", "fit", *fit, "--linear", "--output", str(world / "linear")]) == 0
    return world / "head"


def test_windows_say_where_they_come_from(scorer, world):
    file = read_windows(world / "labelled.parquet")

    assert file.info["num_drafts"] == 3
    assert file.info["counts"]["num_prompts"] == 10
    assert file.info["counts"]["num_windows"] == len(file.windows) > 10
    assert {label for window in file.windows for label in window.labels} <= {-1, 0, 1}
    labels = file.info["labels"]
    named = labels["num_harmless"] + labels["num_harmful"] + labels["num_unknown"]
    assert named == file.info["counts"]["num_mismatches"]


def test_a_linear_head_reads_states_alone(scorer, world):
    config = json.loads((world / "linear" / "config.json").read_text())

    assert (config["num_layers"], config["scalars"]) == (0, [])
    assert config["target_model_path"] == str(world / "base")


def test_rules_are_compared_and_shown(scorer, world, models, capsys):
    questions = str(world / "questions.parquet")
    command = [
        *("scorer", "evaluate", *models, "--validation", questions, "--data", questions, "--limit", "6"),
        *("--accept", "accept-all", "--accept", "probability", "--accept", f"scorer:{scorer}@0.0"),
        *("--accuracy-bound", "0.9", "--output", str(world / "evaluation.json"), "--report", str(world / "report")),
    ]

    assert cli.main(command) == 0

    values = json.loads((world / "evaluation.json").read_text())
    assert list(values["rules"]) == ["strict", "accept-all", "probability", "head"]
    # A threshold of 0 lets everything pass.
    same = ("tokens_per_target_call", "accuracy", "num_lossy_accepted")
    assert [values["rules"]["head"][name] for name in same] == [values["rules"]["accept-all"][name] for name in same]
    assert values["rules"]["accept-all"]["num_lossy_accepted"] > 0
    assert values["rules"]["strict"]["num_prompts"] == 6
    printed = capsys.readouterr().out
    assert "strict (lossless)" in printed
    assert (world / "report" / "index.html").read_text().count("<mark") > 0


def test_eval_shows_a_rule_beside_lossless_decoding(scorer, world, capsys):
    command = [
        *("eval", "--base", str(world / "base"), "--speculator", str(world / "speculator")),
        *("--data", str(world / "questions.parquet"), "--limit", "4", "--batch-size", "4", "--max-new-tokens", "12"),
        *("--accept", "top-k:20", "--answers", "answer", "--json", str(world / "eval.json")),
    ]

    assert cli.main(command) == 0

    values = json.loads((world / "eval.json").read_text())
    lossless, lossy = values["speculators"]
    assert (lossless["lossy_rule"], lossless["identical_outputs"], lossless["num_lossy_accepted"]) == (None, True, 0)
    assert (lossy["lossy_rule"], lossy["identical_outputs"]) == ("top-k:20", None)
    assert lossy["num_lossy_accepted"] > 0
    assert lossy["tokens_per_target_call"] > lossless["tokens_per_target_call"]
    assert lossless["accuracy"] == values["target"]["accuracy"] is not None
    printed = capsys.readouterr().out
    assert "lossy top-k:20" in printed
    assert "its outputs are not the target's own" in printed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--answers": "solution"}, "no column 'solution'; it has messages, answer"),
        ({"--draft": "absent"}, "--draft: there is no folder 'absent'"),
        ({"--num-drafts": "0"}, "--num-drafts must be at least 1"),
        ({"--answer-pattern": "x"}, "needs a group"),
    ],
)
def test_mistakes_in_data(world, models, capsys, changed, words):
    options = dict(zip(models[::2], models[1::2], strict=True)) | changed
    command = [text for pair in options.items() for text in pair]
    data = ["--data", str(world / "questions.parquet"), "--output", str(world / "x.parquet")]

    assert cli.main(["scorer", "data", *command, *data]) == 2

    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--accept", "topk"], "'top-k' is"),
        (["--accept", "top-k"], "--validation"),
        (["--accept", "scorer:absent"], "holds no scorer"),
        (["--accept", "top-k:2", "--accept", "top-k:2"], "same name"),
    ],
)
def test_mistakes_in_rules(world, models, capsys, more, words):
    data = ["--data", str(world / "questions.parquet"), "--output", str(world / "x.json")]

    assert cli.main(["scorer", "evaluate", *models, *data, *more]) == 2

    assert words in capsys.readouterr().err


def test_another_tokenizer_is_refused(world, models, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(world / "draft")
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "draft")
    options = dict(zip(models[::2], models[1::2], strict=True)) | {"--draft": str(tmp_path / "draft")}
    data = ["--data", str(world / "questions.parquet"), "--output", str(world / "x.parquet")]

    assert cli.main(["scorer", "data", *[text for pair in options.items() for text in pair], *data]) == 2

    assert "has 400 tokens and the target 384" in capsys.readouterr().err


def test_mistakes_in_eval(world, capsys):
    command = [
        *("eval", "--base", str(world / "base"), "--speculator", str(world / "speculator")),
        *("--data", str(world / "questions.parquet")),
    ]
    for more, words in (
        (["--accept", "topk"], "--accept: 'topk' is no acceptance rule"),
        (["--accept", "kl:1", "--accept", "kl:1"], "names the same rule twice"),
        (["--answers", "solution"], "no column 'solution'"),
    ):
        assert cli.main([*command, *more]) == 2
        assert words in capsys.readouterr().err
