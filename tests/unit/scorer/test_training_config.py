from __future__ import annotations

import shutil

import pytest
from tokenizers import Tokenizer

from tests.support.windows import make_window, write_window_file
from verl_speculator.errors import ConfigError, DataError, MissingFileError, SpeculatorError
from verl_speculator.scorer.training_config import check_run, load_config, split_arguments


@pytest.fixture(scope="module")
def files(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("config")
    return folder, write_window_file(folder / "windows.parquet", [make_window([4], [7], [3, 4])])


@pytest.fixture
def settings(files, base_model):
    return [f"data.train_files={files[1]}", f"rollout.target_model_path={base_model}"]


def test_the_documents_keys_go_where_they_work(settings, files, base_model):
    config = load_config(
        [
            *settings,
            "lora_rank=64",
            "lora_alpha=16",
            "target_modules=[q_proj,v_proj]",
            "algorithm.adv_estimator=grpo",
            "data.train_batch_size=8",
            "actor.optim.lr=3e-4",
            "actor_rollout_ref.actor.entropy_coeff=0.02",
            "rollout.n=4",
            "rollout.score_threshold=0.7",
            "actor_rollout_ref.rollout.draft_model_path=draft",
            "custom_reward_function.path=mine.py",
        ]
    )
    actor, model, rollout = (config.actor_rollout_ref[name] for name in ("actor", "model", "rollout"))

    assert (model.lora_rank, model.lora_alpha, list(model.target_modules)) == (64, 16, ["q_proj", "v_proj"])
    assert (actor.optim.lr, actor.entropy_coeff, actor.ppo_mini_batch_size) == (3e-4, 0.02, 8)
    assert (rollout.n, rollout.custom.score_threshold, rollout.custom.draft_model_path) == (4, 0.7, "draft")
    assert model.path == rollout.custom.target_model_path == str(base_model)
    assert config.reward.custom_reward_function.path == "mine.py"
    assert config.algorithm.adv_estimator == "grpo"


def test_a_file_of_settings_gives_way_to_the_command_line(settings, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults: [ppo_trainer]\nlora_rank: 8\nrollout: {n: 6, score_threshold: 0.6}\nactor: {grad_clip: 0.5}\n"
    )

    config = load_config([*settings, "rollout.n=3"], str(file))

    rollout = config.actor_rollout_ref.rollout
    assert (config.actor_rollout_ref.model.lora_rank, rollout.n, rollout.custom.score_threshold) == (8, 3, 0.6)
    assert config.actor_rollout_ref.actor.grad_clip == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.score_treshold=1", "did you mean actor_rollout_ref.rollout.custom.score_threshold"),
        ("actor.optim.lrr=1", r"did you mean actor_rollout_ref\.actor\.optim\.lr\?"),
        ("lora_rankk=3", "lora_rankk is not a configuration key"),
        ("reward.reward_kwargs.right_wrongg=1", "did you mean reward.reward_kwargs.right_wrong"),
        ("rollout.custom.threshold.mod=fixed", "did you mean actor_rollout_ref.rollout.custom.threshold.mode"),
        ("reward_model.enable=true", "write reward.reward_model.enable"),
        ("rollout.val_kwargs=3", "is a section"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(settings, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config([*settings, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.adv_estimator=gae", "must be one without a critic"),
        ("rollout.n=1", "at least 2"),
        ("actor.strategy=megatron", "must be fsdp2"),
        ("rollout.name=vllm", "must be spd"),
        ("actor.ppo_mini_batch_size=7", "must divide"),
        ("rollout.threshold.mode=moving", "fixed, adaptive, learned"),
        ("rollout.completion.backend=sglang", "hf, vllm"),
        ("rollout.closed_loop=true", "needs rollout.draft_model_path"),
        ("reward.reward_kwargs.cost=much", "must be a float"),
        ("model.scorer.inner_dimm=3", "'inner_dim' is meant"),
        ("model.scorer.path=/nowhere", "holds no scorer"),
        ("rollout.target_model_path=/nowhere", "there is no folder"),
        ("rollout.target_model_path=null", "must name the target"),
        ("data.train_files=/nowhere.parquet", "scorer data"),
        ("reward.custom_reward_function.path=/nowhere.py", "there is no file"),
        ("actor.fsdp_config.param_offload=true", "must be false"),
        ("model.use_liger=true", "is not for a scorer"),
        ("rollout.score_momentum=2", "must be between 0 and 1"),
        ("model.quantization={quant_method: bitsandbytes, load_in_4bit: true}", "is for accelerators"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(settings, override, message):
    key = override.partition("=")[0]
    with pytest.raises(SpeculatorError, match=message):
        check_run(load_config([*(text for text in settings if not text.startswith(key)), override]))


def test_a_run_that_can_work_passes(settings):
    check_run(load_config(settings))


def test_data_must_be_given(base_model):
    with pytest.raises(ConfigError, match=r"data\.train_files must name the windows"):
        load_config([f"rollout.target_model_path={base_model}"])


def test_a_parquet_file_of_something_else_is_refused(settings, chat_data):
    with pytest.raises(DataError, match="holds no windows"):
        check_run(load_config([settings[1], f"data.train_files={chat_data.train}"]))


def test_a_draft_with_another_tokenizer_is_refused(settings, base_model, tmp_path):
    draft = shutil.copytree(base_model, tmp_path / "draft")
    tokenizer = Tokenizer.from_file(str(draft / "tokenizer.json"))
    tokenizer.add_tokens(["something else"])
    tokenizer.save(str(draft / "tokenizer.json"))
    same = shutil.copytree(base_model, tmp_path / "same")

    check_run(load_config([*settings, f"rollout.draft_model_path={same}"]))
    with pytest.raises(ConfigError, match=r"tokenizer of .*draft.* is not that of the target .*something else"):
        check_run(load_config([*settings, f"rollout.draft_model_path={draft}"]))


def test_a_reward_function_that_is_not_in_its_file_is_refused(settings, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(**row):\n    return 1.0\n")

    own = [*settings, f"reward.custom_reward_function.path={file}"]
    check_run(load_config([*own, "reward.custom_reward_function.name=score"]))
    with pytest.raises(ConfigError, match="has no function 'compute_score'; it has score"):
        check_run(load_config(own))


def test_settings_of_a_rollout_server_are_named(settings, capsys):
    load_config([*settings, "rollout.layered_summon=true", "rollout.gpu_memory_utilization=0.4", "rollout.n=4"])

    said = capsys.readouterr().out
    assert "Without effect" in said
    assert "layered_summon" in said
    assert "rollout.n" not in said


def test_arguments_are_settings_and_one_option(tmp_path):
    assert split_arguments(["a=1", "--config", "file.yaml", "b=2"]) == (["a=1", "b=2"], "file.yaml")
    with pytest.raises(ConfigError, match="--ray is no option"):
        split_arguments(["--ray"])
    with pytest.raises(MissingFileError, match="there is no file"):
        load_config([], str(tmp_path / "none.yaml"))
