"""The parts of `make demo` that need no training; the whole of it is run by tests/integration."""

import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from examples.demo.base_model import initialise, load, training_overrides
from examples.demo.settings import BUDGETS, BaseModelSettings, hydra_path
from examples.demo.stages import Progress, Stages, run_trainer
from examples.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x"] * 3, vocab_size=300)


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
    model, loaded = load(tmp_path / "base")

    assert model.num_parameters() == parameters
    assert model.config.eos_token_id == loaded.eos_token_id
    assert loaded.chat_template == tokenizer.chat_template
