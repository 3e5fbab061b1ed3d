"""What cannot work on Megatron is answered before a process is started and without Megatron being imported."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.files import BaseSizes
from verl_speculator.checkpoint import layout
from verl_speculator.errors import ConfigError
from verl_speculator.trainer import launch
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.megatron import check_layout
from verl_speculator.trainer.config.preflight import check_run
from verl_speculator.trainer.entry import run_trainer

MEGATRON = ["engine=megatron", "optim=megatron"]
INSTALL = "pip install 'verl_speculator[megatron]'"
TP, PP, CP = (f"engine.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))


@pytest.fixture(autouse=True)
def megatron_installed(installed):
    installed("megatron.core", "mbridge", "transformer_engine")


@functools.cache
def defaults(*groups: str) -> DictConfig:
    return load_config(groups)


def configured(*overrides: str, groups: Sequence[str] = MEGATRON) -> DictConfig:
    """What ``load_config`` gives for these settings, without the time that composing takes."""
    config = copy.deepcopy(defaults(*groups))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        key = key.replace("model.partial_pretrain", "model.path")
        OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    return config


@pytest.fixture
def check(good_run):
    def run(*overrides: str, world_size: int = 4) -> None:
        check_run(configured(*good_run, *overrides), world_size)

    return run


@pytest.fixture
def refused(check):
    """The one sentence with which a run is refused."""

    def run(*overrides: str, world_size: int = 4) -> str:
        with pytest.raises(ConfigError) as caught:
            check(*overrides, world_size=world_size)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


def test_good_runs_pass_without_an_import_of_megatron(check) -> None:
    imported = set(sys.modules)
    check()
    check(f"{TP}=2", f"{PP}=2")
    check(f"{CP}=4")
    check("model.freeze_base_model=false", "optim.use_precision_aware_optimizer=true", f"{TP}=2")
    check("+engine.override_transformer_config.num_layers_in_last_pipeline_stage=1", f"{PP}=2")
    assert not [name for name in set(sys.modules) - imported if name.startswith(("megatron", "mbridge"))]


# Packages


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ([], f"engine=megatron needs megatron-core, which is not installed: {INSTALL}"),
        (["mbridge"], f"engine=megatron needs megatron-core, which is not installed: {INSTALL}"),
        (
            ["megatron.core"],
            f"engine=megatron needs mbridge to read the base model, which is not installed: {INSTALL}",
        ),
    ],
)
def test_missing_packages(refused, installed, packages, reason) -> None:
    installed(*packages)
    assert refused() == reason


def test_which_bridge_must_be_there(check, refused, installed) -> None:
    assert refused("engine.vanilla_mbridge=false").startswith("engine.vanilla_mbridge=false needs Megatron-Bridge")
    installed("megatron.core", "megatron.bridge")
    check()
    check("engine.vanilla_mbridge=false")
    assert refused("engine.vanilla_mbridge=true").startswith("engine=megatron needs mbridge")


def test_context_parallelism_needs_transformer_engine(refused, installed) -> None:
    installed("megatron.core", "mbridge")
    assert refused(f"{CP}=2").startswith(f"{CP}=2 needs TransformerEngine, which is not installed")


def test_fsdp_needs_none_of_them(good_run, installed) -> None:
    installed()
    check_run(configured(*good_run, groups=()), 2)


def test_a_driver_of_workers_elsewhere_needs_none_of_them(good_run, installed, monkeypatch, capsys) -> None:
    installed()
    overrides = [*good_run, *MEGATRON, "trainer.n_gpus_per_node=2"]
    assert run_trainer(lambda config: pytest.fail("must not train"), overrides, world_size=None) == 2
    assert "needs megatron-core" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert run_trainer(lambda config: True, overrides, world_size=None) == 0
    assert launch.plan(overrides, num_processes=2, use_ray=True)
    # A process of torchrun is a worker itself.
    assert run_trainer(lambda config: pytest.fail("must not train"), overrides, world_size=2) == 2


# Processes


def test_parallel_sizes_must_divide_the_processes(refused, check) -> None:
    assert refused(f"{TP}=2", world_size=3) == f"{TP}=2 must divide the 3 processes"
    assert refused(f"{TP}=2", f"{PP}=2", world_size=2) == f"{TP}=2 x {PP}=2 = 4 must divide the 2 processes"
    assert refused(f"{PP}=2", f"{CP}=2", world_size=6) == f"{PP}=2 x {CP}=2 = 4 must divide the 6 processes"
    check(f"{TP}=2", f"{PP}=2", world_size=8)


def test_batches_are_cut_over_what_the_parallel_sizes_leave(refused, check) -> None:
    wrong = ["data.train_batch_size=2", "data.use_dynamic_bsz=false", "data.micro_batch_size_per_gpu=1"]
    assert "must be divisible by the 4 data-parallel ranks" in refused(*wrong)
    assert "must be divisible by the 4 data-parallel ranks" in refused(*wrong, f"{TP}=2", world_size=8)
    check(*wrong, f"{TP}=2")
    check(*wrong, f"{CP}=2", world_size=2)


def test_launching(good_run, monkeypatch) -> None:
    monkeypatch.setattr(launch, "_count_devices", lambda: 0)
    overrides = [*good_run, *MEGATRON, f"{TP}=2"]
    command, _ = launch.plan(overrides, num_processes=4, use_ray=False)
    assert "--nproc_per_node=4" in command
    assert command[-len(overrides) :] == overrides
    with pytest.raises(ConfigError, match=f"{TP}=2 must divide the 3 processes"):
        launch.plan(overrides, num_processes=3, use_ray=False)
    with pytest.raises(ConfigError, match="must be 1 on CPU"):
        launch.plan([*overrides, f"{CP}=2"], num_processes=4, use_ray=False)


@pytest.mark.parametrize(("devices", "silenced"), [(0, True), (2, False)])
def test_missing_parts_that_only_a_gpu_needs_are_not_warned_of_on_cpu(good_run, monkeypatch, devices, silenced) -> None:
    monkeypatch.setattr(launch, "_count_devices", lambda: devices)
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    _, environment = launch.plan([*good_run, *MEGATRON], num_processes=2, use_ray=False)
    code = "import warnings; warnings.warn('Apex is not installed. Falling back'); warnings.warn('Another')"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("Apex" not in shown.stderr) is silenced
    assert "Another" in shown.stderr


# The base model


def layout_of(*overrides: str, **changes):
    """Check a model of 12 heads, 4 key-value heads, 512 wide, 24 layers; the refusal, or None."""
    sizes = {"num_layers": 24, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 512}
    base = BaseSizes(**{"hidden_size": 96, "vocab_size": 1200, **sizes, **changes})
    try:
        check_layout(configured(*overrides).engine, base)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("size", "changes", "reason"),
    [
        (8, {}, "must divide the base model's attention heads, 12"),
        (3, {}, "must divide the base model's intermediate size, 512"),
        (4, {"vocab_size": 1202}, "must divide the base model's vocabulary size, 1202"),
        (6, {"intermediate_size": 516}, "must be a divisor or a multiple of the base model's key-value heads, 4"),
    ],
)
def test_a_tensor_parallel_size_that_does_not_fit(size, changes, reason) -> None:
    assert layout_of(f"{TP}={size}", **changes) == f"{TP}={size} {reason}"


def test_tensor_parallel_sizes_that_fit() -> None:
    for size in (1, 2, 4):
        assert layout_of(f"{TP}={size}") is None
    # Megatron-core repeats key-value heads where there are fewer of them than ranks.
    assert layout_of(f"{TP}=4", num_key_value_heads=2) is None
    assert layout_of(f"{TP}=4", num_key_value_heads=1) is None
    # Experts have widths of their own, and nothing is known of an unusual configuration.
    assert layout_of(f"{TP}=3", num_key_value_heads=3, intermediate_size=None) is None
    unknown = dict.fromkeys(("num_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"))
    assert layout_of(f"{TP}=4", f"{PP}=5", **unknown) is None


def test_megatron_bridge_pads_the_vocabulary(installed) -> None:
    assert layout_of(f"{TP}=4", "engine.vanilla_mbridge=false", vocab_size=1202) is None
    assert "vocabulary" in layout_of(f"{TP}=4", "engine.vanilla_mbridge=true", vocab_size=1202)
    installed("megatron.core", "megatron.bridge")
    assert layout_of(f"{TP}=4", vocab_size=1202) is None


def test_mbridge_and_the_tied_embeddings_of_a_llama() -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    message = layout_of(f"{PP}=2", **tied)
    assert message.startswith(f"{PP}=2: mbridge cannot bring the tied embeddings of a llama model")
    assert layout_of(f"{TP}=2", **tied) is None, "one stage has both"
    assert layout_of(f"{PP}=2", "engine.vanilla_mbridge=false", **tied) is None
    assert layout_of(f"{PP}=2", **{**tied, "tie_word_embeddings": False}) is None
    assert layout_of(f"{PP}=2", **{**tied, "model_type": "qwen2"}) is None, "mbridge's Qwen2 knows how"


def layers(**ends: int) -> list[str]:
    return [f"+engine.override_transformer_config.num_layers_in_{end}_pipeline_stage={n}" for end, n in ends.items()]


@pytest.mark.parametrize(
    ("stages", "overrides", "fits"),
    [
        (1, [], True),
        (4, [], True),
        (5, [], False),
        (5, layers(first=4), True),
        (5, layers(first=5), False),
        (5, layers(first=3, last=6), True),
        (2, layers(first=3, last=21), True),
        (2, layers(first=3, last=20), False),
        (3, layers(first=3, last=21), False),
        (3, layers(first=30), False),
        (5, ["+engine.override_transformer_config.account_for_loss_in_pipeline_split=true"], True),
        (4, ["+engine.override_transformer_config.account_for_loss_in_pipeline_split=true"], False),
        (5, ["+engine.override_transformer_config.pipeline_model_parallel_layout=given"], True),
    ],
)
def test_layers_on_pipeline_stages(stages, overrides, fits) -> None:
    message = layout_of(f"{PP}={stages}", *overrides)
    assert (message is None) is fits
    assert fits or f"{PP}={stages}" in message


def test_a_stage_has_a_positive_number_of_layers(refused) -> None:
    message = refused(f"{PP}=2", *layers(first=0))
    assert "num_layers_in_first_pipeline_stage must be null or a positive integer" in message


def test_the_layout_is_checked_with_what_config_json_says(refused, check, base_model, tmp_path) -> None:
    base = json.loads((base_model / "config.json").read_text())
    copy = Path(shutil.copytree(base_model, tmp_path / "base"))

    def write(**changes) -> str:
        (copy / "config.json").write_text(json.dumps({**base, **changes}))
        return f"model.partial_pretrain={copy}"

    assert "key-value heads, 3" in refused(write(num_key_value_heads=3), f"{TP}=2")
    assert "attention heads, 3" in refused(write(num_attention_heads=3, num_key_value_heads=None), f"{TP}=2")
    assert "intermediate size, 63" in refused(write(intermediate_size=63), f"{TP}=2")
    check(write(intermediate_size=63, num_experts=4), f"{TP}=2")
    assert "layers, 3" in refused(write(num_hidden_layers=3), f"{PP}=2")
    assert "vocabulary size, 385" in refused(write(vocab_size=385), f"{TP}=2")


# Values


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (f"{TP}=0", "must be a positive integer"),
        ("engine.strategy=fsdp2", "engine.strategy must be megatron, got 'fsdp2': leave it out"),
        ("engine.dtype=float16", ": set engine.model_dtype=bf16 or fp32 instead"),
        ("engine.dtype=float32", ": set engine.model_dtype=bf16 or fp32 instead"),
        ("engine.model_dtype=fp16", "must be null, bf16 or fp32"),
        ("+engine.override_transformer_config.fp16=true", "float16 is not supported"),
        ("engine.vanilla_mbridge=maybe", "must be null, true or false"),
        ("engine.virtual_pipeline_model_parallel_size=2", "interleaved pipeline stages are not supported"),
        ("engine.expert_model_parallel_size=2", "expert parallelism is not supported"),
        ("engine.dynamic_context_parallel=true", "must be false"),
        ("engine.use_dist_checkpointing=true", "must be false"),
        ("engine.use_megatron_fsdp=true", "give engine=fsdp optim=fsdp"),
        ("engine.use_mbridge=false", "must be true"),
        ("engine.qat.enable=true", "quantization-aware training is not supported"),
        ("engine.router_replay.mode=R2", "must be disabled"),
        ("engine.forward_only=true", "use trainer.val_only=true"),
        ("engine.use_remove_padding=false", "set model.use_remove_padding=false instead"),
        ("model.use_fused_kernels=true", "must be false"),
        ("model.lora_rank=8", "model.lora_rank must be 0"),
        ("model.mtp.enable=true", "without its multi-token prediction"),
        ("optim.optimizer=muon", "must be adam"),
        ("optim.use_precision_aware_optimizer=true", "model.freeze_base_model=true: leave it out"),
        ("+optim.override_optimizer_config.adam_eps=1", "model.freeze_base_model=true: leave it out"),
        ("+engine.override_ddp_config.overlap_grad_reduce=true", "model.freeze_base_model=true: leave it out"),
        ("optim.lr_decay_style=exponential", "must be constant, linear, cosine, inverse-square-root or WSD"),
        ("optim.lr_decay_style=WSD", "needs optim.lr_wsd_decay_steps"),
        ("optim.min_lr=1", "optim.min_lr=1 must not be above optim.lr=0.0001"),
        ("optim.lr_warmup_init=1", "optim.lr_warmup_init=1 must not be above optim.lr=0.0001"),
        ("optim.lr_warmup_steps_ratio=1", "must be null or a number from 0 on and below 1"),
    ],
)
def test_values(refused, override, reason) -> None:
    message = refused(override)
    section, name = override.lstrip("+").partition("=")[0].split(".")[:2]
    assert f"{section}.{name}" in message
    assert reason in message


def test_warming_up_must_end(refused, check) -> None:
    warmup = "optim.lr_warmup_steps=10"
    check(warmup)
    assert "less than trainer.total_training_steps=10" in refused(warmup, "trainer.total_training_steps=10")
    assert "less than optim.lr_decay_steps=5" in refused(warmup, "optim.lr_decay_steps=5")
    check(warmup, "optim.lr_decay_steps=11", "trainer.total_training_steps=4")


def test_joint_training(refused, check) -> None:
    joint = "model.freeze_base_model=false"
    check(joint, f"{TP}=2", f"{PP}=2")
    check(joint, "+engine.override_ddp_config.overlap_grad_reduce=true")
    message = refused(joint, f"{CP}=2")
    assert message.startswith(f"{CP}=2 must be 1 in joint training")


def test_megatron_is_not_chosen_by_a_strategy(good_run) -> None:
    with pytest.raises(ConfigError, match="give engine=megatron optim=megatron"):
        check_run(configured(*good_run, "engine.strategy=megatron", groups=()), 2)


# Resuming


@pytest.fixture
def checkpoint(write_speculator, tmp_path, good_run):
    """Write a complete checkpoint of a run with these overrides where the run of ``good_run`` looks for one."""
    speculator = write_speculator(tmp_path / "trained")

    def write(*overrides: str, groups: Sequence[str] = MEGATRON) -> Path:
        root = tmp_path / "checkpoints"
        staging = layout.open_staging(root, 4)
        shutil.copytree(speculator, staging / "speculator")
        (staging / "resume").mkdir(exist_ok=True)
        OmegaConf.save(configured(*good_run, *overrides, groups=groups), staging / layout.RUN_CONFIG_FILE, resolve=True)
        return layout.commit(root, 4)

    return write


def test_a_run_goes_on_with_the_engine_that_began_it(refused, check, checkpoint, good_run) -> None:
    folder = checkpoint("engine.strategy=fsdp", groups=())
    message = refused()
    assert message.startswith(f"engine=megatron cannot go on from {folder}, whose optimizer and schedule are those of ")
    assert f"model.speculator_path={folder} and another trainer.default_local_dir" in message
    check(f"model.speculator_path={folder}", "trainer.resume_mode=disable")
    shutil.rmtree(folder)
    checkpoint()
    with pytest.raises(ConfigError, match=r"engine=fsdp cannot go on from .* those of engine=megatron: "):
        check_run(configured(*good_run, groups=()), 2)
    check()


def test_a_frozen_run_goes_on_with_any_layout(check, checkpoint) -> None:
    checkpoint(f"{TP}=2", f"{PP}=2")
    check()
    check(f"{CP}=2")


@pytest.mark.parametrize("key", [TP, PP])
def test_a_joint_run_goes_on_with_its_own_layout(refused, check, checkpoint, key) -> None:
    joint = "model.freeze_base_model=false"
    folder = checkpoint(joint, f"{key}=2")
    check(joint, f"{key}=2")
    message = refused(joint)
    assert message.startswith(f"{key}=1, but the base model's optimizer state in {folder} was cut with 2: ")
    check(joint, "trainer.resume_mode=disable")
