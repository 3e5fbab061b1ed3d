from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_speculator.adapters.settings import SHARED_DEFAULTS
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config import compose
from verl_speculator.trainer.config.compose import load_config

GUIDE = {
    "model.speculator.n_predict": 5,
    "model.speculator.inner_dim": 1024,
    "model.speculator.emb_dim": 1024,
    "model.speculator.proj_dim": 1024,
    "model.speculator.scale_input": False,
    "model.speculator.tie_weights": True,
    "model.speculator.tie_lstm_embs": False,
    "model.speculator.method": "sum_rnn",
    "model.speculator_loss_coeff": 1.0,
    "model.freeze_base_model": True,
    "optim.lr": 1e-4,
    "trainer.total_epochs": 1,
    "trainer.save_freq": 1000,
    "trainer.test_freq": 500,
    "data.micro_batch_size_per_gpu": 4,
}


@pytest.mark.parametrize("key", GUIDE)
def test_default_of_the_user_guide(key, defaults) -> None:
    value = OmegaConf.select(defaults, key)
    assert value == GUIDE[key]
    assert type(value) is type(GUIDE[key])


@pytest.fixture(scope="module")
def defaults():
    return load_config([])


def test_adapters_know_the_defaults_of_the_file(defaults) -> None:
    assert OmegaConf.to_container(defaults.model.speculator) == SHARED_DEFAULTS


def test_everything_of_verls_trainer_is_there(defaults) -> None:
    assert {"data", "checkpoint", "trainer", "model", "engine", "optim", "profiler"} <= set(defaults)
    assert defaults.data.messages_key == "messages"
    assert defaults.model._target_ == "verl_speculator.engine.model_config.SpeculatorModelConfig"


@pytest.mark.parametrize("groups", [[], ["engine=fsdp"], ["engine=fsdp", "optim=fsdp"], ["model=hf_model"]])
def test_group_overrides_keep_our_defaults(groups) -> None:
    config = load_config(groups)
    assert config.engine.strategy == "fsdp2"
    assert config.engine.model_dtype is None
    assert config.engine._target_ == "verl.workers.config.FSDPEngineConfig"
    assert config.optim._target_ == "verl_speculator.engine.optimizer_config.SpeculatorFSDPOptimizerConfig"
    assert config.optim.lr == 1e-4
    assert config.model.speculator.n_predict == 5


def test_megatron_is_a_switch_of_two_groups(defaults) -> None:
    config = load_config(["engine=megatron", "optim=megatron", "model.use_remove_padding=false"])
    assert config.engine._target_ == "verl_speculator.engine.megatron.config.SpeculatorMcoreEngineConfig"
    assert config.optim._target_ == "verl_speculator.engine.optimizer_config.SpeculatorMcoreOptimizerConfig"
    assert config.optim.base_lr is None
    assert (config.engine.strategy, config.engine.model_dtype, config.engine.vanilla_mbridge) == (
        "megatron",
        None,
        None,
    )
    assert config.engine.use_remove_padding is False
    assert config.optim.lr == 1e-4
    for section in ("data", "trainer", "checkpoint"):
        assert config[section] == defaults[section]
    assert {**config.model, "use_remove_padding": True} == {**defaults.model}


def test_megatrons_settings_make_its_typed_configuration() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = load_config(["engine=megatron", "optim=megatron", "engine.tensor_model_parallel_size=2"])
    config.engine.update(model_dtype="fp32", vanilla_mbridge=True)
    engine = omega_conf_to_dataclass(config.engine)
    assert (engine.tensor_model_parallel_size, engine.dtype, engine.use_remove_padding) == (2, "float32", True)
    assert omega_conf_to_dataclass(config.optim).lr == 1e-4


def test_strategy_given_with_a_group() -> None:
    assert load_config(["engine=fsdp", "engine.strategy=fsdp"]).engine.strategy == "fsdp"
    assert load_config(["engine.strategy=fsdp", "engine=fsdp"]).engine.strategy == "fsdp"


def test_two_names_for_the_base_model() -> None:
    for key in ("model.path", "model.partial_pretrain"):
        config = load_config([f"{key}=/some/model"])
        assert config.model.path == config.model.partial_pretrain == "/some/model"
    same = load_config(["model.path=/some/model", "model.partial_pretrain=/some/model"])
    assert same.model.path == "/some/model"
    with pytest.raises(ConfigError, match=r"model\.path and model\.partial_pretrain are two names"):
        load_config(["model.path=/some/model", "model.partial_pretrain=/another"])


@pytest.mark.parametrize("value", ["1024.2048", "1024.2050"])
def test_dotted_widths_arrive_as_typed(value) -> None:
    assert load_config([f"model.speculator.inner_dim={value}"]).model.speculator.inner_dim == value


def test_adapter_in_three_forms(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_adapter.py").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(["model.speculator_adapter={path: my_adapter.py, name: MyAdapter}"])
    # Absolute: a Ray worker may stand in another folder.
    assert config.model.speculator_adapter == {"path": str(tmp_path / "my_adapter.py"), "name": "MyAdapter"}
    assert load_config(["model.speculator_adapter={fqn: a.b.C}"]).model.speculator_adapter == {"fqn": "a.b.C"}
    assert load_config(["model.speculator_adapter=a.b.C"]).model.speculator_adapter == "a.b.C"


def test_local_paths_become_absolute_and_others_stay(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("train.parquet", "more=1.parquet"):
        (tmp_path / name).touch()
    config = load_config(
        [
            "data.train_files=[train.parquet,'more=1.parquet']",
            "data.val_files=~/train.parquet",
            "model.path=Qwen/Qwen2.5-0.5B-Instruct",
            "trainer.default_local_dir=./out",
        ]
    )
    assert config.data.train_files == [str(tmp_path / "train.parquet"), str(tmp_path / "more=1.parquet")]
    assert config.data.val_files == str(tmp_path / "train.parquet")
    assert config.model.path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.trainer.default_local_dir == str(tmp_path / "out")


def test_interpolations(monkeypatch) -> None:
    monkeypatch.setenv("WIDTH", "48")
    config = load_config(["trainer.project_name=a", "trainer.experiment_name=w-${oc.env:WIDTH}"])
    assert config.trainer.default_local_dir == str(Path.cwd() / "checkpoints/a/w-48")
    with pytest.raises(ConfigError, match="Interpolation key 'nothing' not found"):
        load_config(["trainer.experiment_name=${nothing}"])


def test_verl_may_lie_in_a_folder_of_any_name(tmp_path, monkeypatch) -> None:
    copy = tmp_path / "it's a = b" / "config"
    shutil.copytree(compose.verl_config_dir(), copy, ignore=shutil.ignore_patterns("*.py", "_generated*"))
    monkeypatch.setattr(compose, "verl_config_dir", lambda: copy)
    assert load_config(["optim.lr=3e-4"]).optim.lr == 3e-4


def test_without_verl(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="verl is not installed"):
        load_config([])
