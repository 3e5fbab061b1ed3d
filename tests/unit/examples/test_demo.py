"""The parts of `make demo` that need no training; the whole of it is run by tests/integration."""

import time

import pyarrow.parquet as pq
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from examples.demo.run import SHIPPED, summarize, training_command
from examples.demo.settings import BUDGETS, MAX_NEW_TOKENS, hydra_path
from examples.demo.stages import Progress, Stages, bar_progress, run_command, training_progress
from tests.support.tiny import write_chats
from verl_speculator.trainer.config.compose import load_config


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


def test_a_failed_command_shows_the_end_of_its_output(tmp_path):
    log = tmp_path / "logs" / "eval.log"

    with pytest.raises(
        SystemExit, match=r"--speculator: there is no folder[\s\S]*`eval` failed \(exit status 2\)[\s\S]*eval.log"
    ):
        run_command(
            ["eval", "--base", "/no/model", "--speculator", "/none", "--data", str(tmp_path / "absent.parquet")],
            log,
            Progress("measure"),
            bar_progress,
        )

    assert "error:" in log.read_text()


def test_what_is_shown_of_a_commands_output():
    step = "step:3 - train/loss:1.5 - train/acceptance_length:1.25 - train/lr:1e-3"

    assert training_progress(step) == "step 3  loss 1.50  acceptance length (teacher-forced) 1.25"
    assert training_progress("Saving checkpoint") is None
    assert bar_progress("Decoding:  50%|█████     | 4/8 [00:10<00:10,  2.5s/prompt]") == "Decoding 4/8"
    assert bar_progress("acceptance length  1.80 (1.70 to 1.90)") is None


@pytest.mark.parametrize("folder", ["plain", "with space", "it's", "a,b=c{d}", "back\\slash"])
def test_paths_survive_hydra(tmp_path, folder):
    override = OverridesParser.create().parse_override(f"model.path={hydra_path(tmp_path / folder)}")

    assert override.value() == str(tmp_path / folder)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_training_command_is_one_that_the_trainer_takes(budget, base_model, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        write_chats(tmp_path / "data" / f"{name}.parquet", 32)

    command = training_command(base_model, tmp_path / "data", tmp_path / "out", tmp_path / "cache", BUDGETS[budget])
    config = load_config([argument for argument in command if "=" in argument])

    assert config.model.speculator.draft_vocab_size == BUDGETS[budget].speculator.draft_vocab_size
    assert BUDGETS[budget].speculator.batch_size % 2 == 0, "two processes share a batch"


def test_the_fastest_number_of_drafts_is_the_speed_up():
    ways = [
        {"num_draft_tokens": count, "speedup": speedup, "identical_outputs": count != 3}
        for count, speedup in ((1, 1.1), (2, 1.2), (3, 0.9))
    ]
    acceptance = {
        "acceptance_length": {"mean": 1.9, "low": 1.8, "high": 2.0},
        "acceptance_per_position": [0.5, 0.3, 0.1],
        "prompt_lookup": {"acceptance_length": {"mean": 1.4}},
        "identical_outputs": True,
        "speedup_memory_bound": 1.7,
        "num_prompts": 48,
        "target": {"held_out_loss": None, "repeated_4grams": 0.1},
    }

    summary = summarize(acceptance, {"speculators": ways}, {"base": 1.0, "measure": 2.25})

    assert (summary["speedup"], summary["speedup_num_drafts"]) == (1.2, 2)
    assert summary["speedup_per_num_drafts"] == {"1": 1.1, "2": 1.2, "3": 0.9}
    assert summary["identical_outputs"] is False
    assert summary["seconds"] == 3.2


def test_the_shipped_answers_are_the_shipped_prompts(tmp_path):
    tables = {split: pq.read_table(SHIPPED / f"{split}.parquet") for split in ("train", "val", "test")}
    requests = {
        split: [messages[0]["content"] for messages in table["messages"].to_pylist()] for split, table in tables.items()
    }

    assert not set(requests["test"]) & {*requests["train"], *requests["val"]}
    assert len(set(requests["test"])) >= BUDGETS["full"].decoding.num_prompts
    for split in ("train", "val"):
        for ids, mask in zip(*(tables[split][name].to_pylist() for name in ("input_ids", "loss_mask")), strict=True):
            assert len(ids) == len(mask)
            assert 0 < sum(mask) <= MAX_NEW_TOKENS
            assert mask == sorted(mask), "one answer, at the end"
