"""A run goes on from its own checkpoint, and from no other run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from tests.support.tiny import write_chats
from verl_speculator.checkpoint.layout import RUN_CONFIG_FILE
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.resuming import ORIGIN_FILE, check_same_run, describe_origin

AFRESH = "or start afresh with another trainer.default_local_dir or trainer.resume_mode=disable"


@pytest.fixture
def config(good_run) -> DictConfig:
    return load_config([*good_run, "+optim.override_optimizer_config.fused=true"])


@pytest.fixture
def checkpoint(config, tmp_path) -> Path:
    """What a checkpoint of this configuration says about its run."""
    folder = tmp_path / "global_step_4"
    (folder / "resume").mkdir(parents=True)
    OmegaConf.save(config, folder / RUN_CONFIG_FILE, resolve=True)
    (folder / ORIGIN_FILE).write_text(json.dumps(describe_origin(config)))
    return folder


@pytest.fixture
def refused(config, checkpoint) -> Callable[..., str]:
    """The sentence with which the run, changed in some keys, may not go on."""

    def run(**changes) -> str:
        with pytest.raises(ConfigError) as caught:
            check_same_run(changed(config, **changes), checkpoint)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def changed(config: DictConfig, **changes) -> DictConfig:
    config = config.copy()
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    return config


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.speculator.n_predict", 3, "model.speculator.n_predict=3"),
        ("model.speculator.tie_weights", False, "model.speculator.tie_weights=false"),
        ("model.speculator_adapter", "verl_speculator.adapters.MLPSpeculatorAdapter", "model.speculator_adapter=verl"),
        ("model.speculator_adapter", {"fqn": "a.b.C"}, "model.speculator_adapter={'fqn': 'a.b.C'}"),
        ("model.speculator_loss_coeff", 0.5, "model.speculator_loss_coeff=0.5"),
        ("model.freeze_base_model", False, "model.freeze_base_model=false"),
        ("model.speculator_path", "/some/where", "model.speculator_path=/some/where"),
        ("optim.lr", 3e-4, "optim.lr=0.0003"),
        ("optim.lr_scheduler_type", "cosine", "optim.lr_scheduler_type=cosine"),
        ("optim.override_optimizer_config", {"fused": False}, "optim.override_optimizer_config={'fused': False}"),
        ("data.train_batch_size", 16, "data.train_batch_size=16"),
        ("data.max_length", 512, "data.max_length=512"),
        ("data.train_max_samples", 48, "data.train_max_samples=48"),
        ("data.truncation", "error", "data.truncation=error"),
        ("data.custom_cls.path", "own.py", "data.custom_cls"),
        ("trainer.seed", 2, "trainer.seed=2"),
    ],
)
def test_another_setting_that_changes_what_is_learned(refused, checkpoint, config, key, value, words) -> None:
    message = refused(**{key: value})
    assert message.startswith(words)
    assert f"but {checkpoint} was trained with " in message
    assert message.endswith(f": give that to go on, {AFRESH}")
    check_same_run(config, checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.logger", ["console", "file"]),
        ("trainer.save_freq", 1),
        ("trainer.total_epochs", 9),
        ("trainer.total_training_steps", 99),
        ("trainer.n_gpus_per_node", 8),
        ("trainer.max_ckpt_to_keep", 2),
        ("optim.total_training_steps", 99),
        ("data.micro_batch_size_per_gpu", 1),
        ("data.max_token_len_per_gpu", 4096),
        ("data.use_dynamic_bsz", False),
        ("data.num_workers", 0),
        ("data.val_files", None),
        ("model.use_remove_padding", False),
        ("model.measure_sampled_acceptance", False),
        ("model.speculator.inner_dim", "16"),
        ("engine.ulysses_sequence_parallel_size", 2),
        ("engine.model_dtype", "bf16"),
    ],
)
def test_what_may_change_freely(config, checkpoint, key, value) -> None:
    check_same_run(changed(config, **{key: value}), checkpoint)


def test_a_setting_that_an_older_configuration_did_not_have(config, checkpoint) -> None:
    check_same_run(changed(config, **{"optim.new_in_a_later_version": 1}), checkpoint)


def test_another_base_model_of_the_same_size(config, checkpoint, refused, tmp_path) -> None:
    base = Path(config.model.path)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    # The same weights in another folder are the same base.
    check_same_run(changed(config, model__path=str(other)), checkpoint)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    weights[name][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert (other / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    message = refused(model__path=str(other))
    assert message == (f"model.path={other}, but {checkpoint} was trained with {base}: give that to go on, {AFRESH}")
    assert refused(model__path="Qwen/Another").startswith("model.path=Qwen/Another, but ")


def test_other_data(config, checkpoint, refused, tmp_path) -> None:
    file = Path(config.data.train_files)
    moved = Path(shutil.copy(file, tmp_path / "moved.parquet"))
    check_same_run(changed(config, data__train_files=str(moved)), checkpoint)
    other = write_chats(tmp_path / "other.parquet", 64, seed=7)
    assert refused(data__train_files=str(other)).startswith(f"data.train_files={other}, but {checkpoint} was trained")
    more = refused(data__train_files=[str(file), str(other)])
    assert more.startswith(f"data.train_files={other}, but {checkpoint} was trained with nothing")


def test_a_file_that_has_changed_since(config, checkpoint, refused, tmp_path) -> None:
    file = write_chats(tmp_path / "train.parquet", 64)
    own = changed(config, data__train_files=str(file))
    (checkpoint / ORIGIN_FILE).write_text(json.dumps(describe_origin(own)))
    write_chats(file, 65)
    message = refused(data__train_files=str(file))
    assert f"data.train_files={file}, but {checkpoint} was trained with {file} as it was then" in message


def test_evaluation_needs_the_base_and_the_speculator_and_not_the_data(config, checkpoint, refused, tmp_path) -> None:
    evaluates = {"trainer.val_only": True}
    other = write_chats(tmp_path / "other.parquet", 64, seed=7)
    check_same_run(changed(config, **evaluates, **{"data.train_files": str(other), "optim.lr": 1.0}), checkpoint)
    assert refused(**evaluates, **{"model.speculator.n_predict": 3}).startswith("model.speculator.n_predict=3")
    assert refused(**evaluates, **{"model.path": "Qwen/Another"}).startswith("model.path=Qwen/Another")


def test_names_count_where_a_checkpoint_has_no_fingerprints(config, checkpoint, refused, tmp_path) -> None:
    (checkpoint / ORIGIN_FILE).unlink()
    check_same_run(config, checkpoint)
    moved = Path(shutil.copy(config.data.train_files, tmp_path / "moved.parquet"))
    assert refused(data__train_files=str(moved)).startswith(f"data.train_files={moved}, but ")
    assert refused(model__path="Qwen/Another").startswith("model.path=Qwen/Another, but ")
