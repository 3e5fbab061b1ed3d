"""The parts of `make demo` that need no training; the whole of it is run by tests/integration."""

import json
import time

import pandas as pd
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.demo.answers import encode_prompts, load_base, read_requests, write_answers
from examples.demo.base_model import initialise, training_overrides
from examples.demo.decode import DecodedPrompt, Measurement, length_before_loop, mark_accepted, measure
from examples.demo.settings import BUDGETS, BaseModelSettings, hydra_path
from examples.demo.stages import Progress, Stages, run_trainer
from examples.demo.tokenizer import train_tokenizer
from verl_speculator.decoding import DecodingResult
from verl_speculator.models import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig

REQUESTS = ["Complete `f`.", "Complete `a_longer_name` of module `m`.", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x"] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.4, **sizes)
    return Qwen2ForCausalLM(config).eval()


class Work:
    """A stage's work that counts how often it is done."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, progress: Progress) -> str:
        self.times += 1
        return "done"


def run_stages(output, works, **changed):
    stages = Stages(output)
    for name, work in works.items():
        stages.run(name, changed.get(name, {"steps": 1}), work)


def test_a_finished_stage_is_not_repeated(tmp_path, capsys):
    works = {"first": Work(), "second": Work()}

    run_stages(tmp_path, works)
    run_stages(tmp_path, works)

    assert [work.times for work in works.values()] == [1, 1]
    assert capsys.readouterr().out.count("done before") == 2


def test_changed_settings_repeat_the_stage_and_all_later_ones(tmp_path):
    works = {"first": Work(), "second": Work(), "third": Work()}
    run_stages(tmp_path, works)

    run_stages(tmp_path, works, second={"steps": 2})

    assert [work.times for work in works.values()] == [1, 2, 2]


def test_a_lost_product_repeats_its_stage(tmp_path):
    product, work = tmp_path / "product", Work()
    for exists in (True, True, False):
        if exists:
            product.touch()
        else:
            product.unlink()
        Stages(tmp_path).run("first", {}, work, [product])

    assert work.times == 2


def test_the_seconds_are_those_of_the_run_that_did_the_work(tmp_path):
    stages = Stages(tmp_path)
    stages.run("first", {}, lambda progress: time.sleep(0.05) or "done")

    again = Stages(tmp_path)
    again.run("first", {}, Work())

    assert again.seconds == stages.seconds
    assert again.seconds["first"] >= 0.05


def test_a_stage_that_failed_is_repeated(tmp_path):
    def fail(progress):
        raise OSError("full")

    work = Work()
    run_stages(tmp_path, {"first": work})
    with pytest.raises(OSError, match="full"):
        Stages(tmp_path).run("first", {"steps": 2}, fail)

    run_stages(tmp_path, {"first": work})

    assert work.times == 2


def test_a_failed_trainer_shows_the_end_of_its_output(tmp_path):
    code = "print('step:3 - train/loss:1.5'); print('the reason'); raise SystemExit(3)"

    with pytest.raises(SystemExit, match=r"the reason[\s\S]*exit status 3[\s\S]*train.log"):
        run_trainer(["-c", code], 5, tmp_path / "logs" / "train.log", Progress("base"))

    assert "the reason" in (tmp_path / "logs" / "train.log").read_text()


@pytest.mark.parametrize("folder", ["plain", "with space", "it's", "a,b=c{d}", "back\\slash"])
def test_paths_survive_hydra(tmp_path, folder):
    override = OverridesParser.create().parse_override(f"model.path={hydra_path(tmp_path / folder)}")

    assert override.value() == str(tmp_path / folder)


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_hold_together(budget, tmp_path):
    settings = BUDGETS[budget]

    overrides = training_overrides(settings.base, tmp_path, tmp_path, tmp_path, num_processes=2)

    assert settings.base.vocab_size == settings.data.vocab_size
    assert settings.base.batch_size % 2 == settings.speculator.batch_size % 2 == 0
    assert len(OverridesParser.create().parse_overrides(overrides)) == len(overrides)


def test_an_initial_base_model_loads_with_its_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = BaseModelSettings(vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)

    parameters = initialise(tmp_path / "tokenizer", settings, tmp_path / "base")
    model, loaded = load_base(tmp_path / "base")

    assert model.num_parameters() == parameters
    assert model.config.eos_token_id == loaded.eos_token_id
    assert loaded.chat_template == tokenizer.chat_template


def test_answers_are_the_models_own_greedy_text(model, tokenizer, tmp_path):
    parquet = tmp_path / "data" / "answers.parquet"
    tokenizer.padding_side = "left"

    write_answers(model, tokenizer, REQUESTS, parquet, batch_size=2, max_new_tokens=9, report=lambda done: None)

    rows = pd.read_parquet(parquet)["messages"]
    assert sorted(read_requests(parquet, 10)) == sorted(REQUESTS)
    for user, assistant in rows:
        prompt = encode_prompts(tokenizer, [user["content"]])
        output = model.generate(**prompt, max_new_tokens=9, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answer = output[0, prompt["input_ids"].shape[1] :]
        assert assistant["content"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_measurement_counts_both_ways_of_decoding(model, tokenizer):
    config = ArcticLSTMSpeculatorConfig(
        input_hidden_dim=32, vocab_size=len(tokenizer), n_predict=3, inner_dim=16, emb_dim=16, proj_dim=16,
        method="sum_lstm",
    )  # fmt: skip
    measurement = measure(
        model, ArcticLSTMSpeculator(config), tokenizer, REQUESTS, max_new_tokens=12, report=lambda done: None
    )

    assert measurement.identical_outputs
    assert measurement.plain_forwards == measurement.num_tokens
    drafts = measurement.speculative_forwards - len(REQUESTS)
    assert measurement.counts.num_drafts == drafts
    json.dumps(measurement.counts.acceptance_rate_per_position)


def test_loops_begin_where_four_tokens_come_again():
    assert length_before_loop([1, 2, 3, 4, 5, 1, 2, 3, 9]) == 9
    assert length_before_loop([7, 1, 2, 3, 4, 1, 2, 3, 4, 1]) == 5
    assert length_before_loop([8, 8, 8, 8, 8, 8]) == 1
    assert length_before_loop([]) == 0


def test_rounds_in_loops_can_be_left_out():
    looping = DecodingResult([[5, 1, 2, 3, 4, 1, 2, 3, 4, 1]], 5, 3, [[0, 2, 3, 2]])

    measurement = Measurement([DecodedPrompt("r", looping, looping)], 0.0, 0.0)

    # Tokens 1, 2 to 4, and 5 to 8 of the output come from the first three rounds; the loop begins at token 5.
    assert measurement.counts_before_loops.num_accepted_tokens == 2
    assert measurement.counts_before_loops.num_drafts == 2
    assert measurement.share_in_loops == 0.5


def test_accepted_tokens_are_marked(tokenizer):
    tokens = [tokenizer(letter).input_ids[0] for letter in "abcdefg"]
    result = DecodingResult([tokens], 4, 3, [[2, 0, 3]])  # the last round ran past the end by two tokens

    assert mark_accepted(tokenizer, result, "<", ">") == "a<bc>de<fg>"
