from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.tiny import VOCAB_SIZE
from verl_speculator.adapters.following import KEY
from verl_speculator.errors import ConfigError, SpeculatorError
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig
from verl_speculator.rl import grpo_config
from verl_speculator.rl.grpo_config import check_run, load_config

ENGINE = "actor_rollout_ref.rollout.engine_kwargs.vllm"


def write_speculator(folder, hidden_size: int):
    config = MLPSpeculatorConfig(input_hidden_dim=hidden_size, vocab_size=VOCAB_SIZE, n_predict=2, inner_dim=8)
    speculator = MLPSpeculator(config)
    speculator.reset_parameters(torch.Generator().manual_seed(0))
    speculator.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("grpo")
    write_speculator(folder / "speculator", 32)
    write_speculator(folder / "foreign", 48)
    pq.write_table(pa.table({"prompt": [[{"role": "user", "content": "w1"}]]}), folder / "prompts.parquet")
    return folder


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """vLLM and TransferQueue are not in every environment of the tests."""
    monkeypatch.setattr(grpo_config, "find_spec", lambda name: name)


@pytest.fixture
def settings(world, base_model):
    return [
        f"model.path={base_model}",
        f"speculator.path={world}/speculator",
        f"data.train_files={world}/prompts.parquet",
    ]


def test_short_names_stand_for_verls(settings, world):
    config = load_config(
        [
            *settings,
            "actor.optim.lr=3e-6",
            "rollout.n=16",
            "speculator.max_tokens_per_step=4096",
            "actor_rollout_ref.ref.fsdp_config.param_offload=true",
            f"{ENGINE}.speculative_config.num_speculative_tokens=2",
            "+algorithm.something_new=1",
        ]
    )
    check_run(config)
    roles = config.actor_rollout_ref
    assert roles.actor.optim.lr == 3e-6
    assert roles.rollout.n == 16
    assert roles.ref.fsdp_config.param_offload
    assert roles.actor.fsdp_config.speculator.max_tokens_per_step == 4096
    assert roles.rollout.engine_kwargs.vllm.speculative_config == {
        "model": f"{world}/speculator",
        "num_speculative_tokens": 2,
    }
    assert config.algorithm.something_new == 1


def test_the_engine_reads_what_was_composed(settings):
    from verl.utils.config import omega_conf_to_dataclass

    from verl_speculator.engine.policy_config import PolicyEngineConfig

    config = load_config([*settings, "speculator.lr=0.5"]).actor_rollout_ref
    engine = omega_conf_to_dataclass(config.actor.fsdp_config)
    assert isinstance(engine, PolicyEngineConfig)
    assert engine.speculator["lr"] == 0.5
    assert not isinstance(omega_conf_to_dataclass(config.ref.fsdp_config), PolicyEngineConfig)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without an accelerator needs")
def test_on_a_cpu_what_is_open_is_filled_in_and_what_is_set_stays(settings):
    config = load_config([*settings, "rollout.dtype=bfloat16"])
    rollout = config.actor_rollout_ref.rollout
    assert rollout.dtype == "bfloat16"
    assert (rollout.enable_sleep_mode, rollout.free_cache_engine, rollout.enforce_eager) == (False, False, True)
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "fp32"
    assert config.trainer.device == "cpu"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["rolout.n=2"], "rolout.n is not a configuration key"),
        (["rollout.nn=2"], "did you mean actor_rollout_ref.rollout.n"),
        (["rollout=2"], "rollout is a section"),
        (["~trainer"], "cannot be removed"),
        (["speculator.every=2"], f"{KEY}.every is not a setting"),
        (["speculator.adaptive=true", "speculator.shadow_frozen=false"], f"{KEY}.adaptive=true"),
        (["speculator.replay_steps=3"], f"{KEY}.replay_steps=3 is read by extra_steps"),
        (["speculator.path=nowhere"], f"{KEY}.path: there is no folder 'nowhere'"),
        (["speculator.path=WORLD/foreign"], "hidden size"),
        (["rollout.name=sglang"], "actor_rollout_ref.rollout.name=sglang cannot draft with this speculator: take vllm"),
        (["actor.strategy=megatron"], "trains no speculator beside the policy"),
        (["rollout.checkpoint_engine.backend=delta_sharded"], "delta_sharded sends shards of the policy alone"),
        (["model.use_fused_kernels=true"], "use_fused_kernels=true skips lm_head"),
        (["+actor.fsdp_config.mixed_precision={param_dtype: fp16}"], "fp16 scales the policy's loss"),
        (["model.lora_rank=8"], "lora_rank: adapters are sent apart from the weights"),
        (["trainer.v1.trainer_mode=separate_async"], "trainer.v1.trainer_mode=separate_async must be"),
        ([f"{ENGINE}.speculative_config.num_speculative_tokens=3"], "num_speculative_tokens must be from 1"),
        ([f"{ENGINE}.speculative_config.model=WORLD/foreign"], "must be the speculator that learns"),
        (["data.train_files=null"], "data.train_files must name parquet files"),
        (["data.val_files=WORLD/none.parquet"], "none.parquet"),
        (["rollout.checkpoint_engine.update_weights_bucket_megabytes=0"], "is too small for a tensor of the policy"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(settings, world, changes, words):
    changes = [one.replace("WORLD", str(world)) for one in changes]
    with pytest.raises(SpeculatorError) as error:
        check_run(load_config([*settings, *changes]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("missing", "words"), [("transfer_queue", r"verl_speculator\[rl\]"), ("vllm", "not installed")]
)
def test_a_missing_package_is_named(settings, monkeypatch, missing, words):
    monkeypatch.setattr(grpo_config, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ConfigError, match=words):
        check_run(load_config(settings))
