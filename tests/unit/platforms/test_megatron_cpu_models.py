"""Megatron's models and optimizer on the CPU, in one process, against Hugging Face's and against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import VOCAB_SIZE, write_base_model
from verl_speculator.errors import ConfigError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron runs on the CPU only without an accelerator"),
]
LENGTHS = [7, 12, 1, 5]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The platform on a single rank."""
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    pytest.importorskip("mbridge", reason="needs mbridge")
    from megatron.core import parallel_state, tensor_parallel

    from verl_speculator.platforms import megatron_cpu

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        megatron_cpu.install()
        with megatron_cpu.emulated_device():
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        yield megatron_cpu
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture
def emulated(platform):
    with platform.emulated_device():
        yield


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    def write(family: str, tie: bool) -> Path:
        return write_base_model(tmp_path_factory.mktemp(family), family=family, tie=tie)

    return write


@pytest.fixture
def bridge_of(monkeypatch) -> Callable[..., Any]:
    from mbridge.models.qwen2 import Qwen2Bridge
    from transformers import AutoConfig
    from verl.models.mcore.mbridge import AutoBridge

    def build(folder: Path, dtype: torch.dtype) -> Any:
        # mbridge notes in its class that a model is tied, for all models of the process.
        monkeypatch.setattr(Qwen2Bridge, "_DIRECT_MAPPING", dict(Qwen2Bridge._DIRECT_MAPPING))
        config = AutoConfig.from_pretrained(folder)
        config.rope_theta = config.rope_parameters["rope_theta"]
        return AutoBridge.from_config(config, dtype=dtype)

    return build


def transformer_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    plain = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0}
    return TransformerConfig(**{**plain, "normalization": "RMSNorm", **changes})


# Layers


def test_norm_is_that_of_the_model(emulated) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from verl_speculator.platforms.megatron_cpu.layers import RmsNorm

    norm, reference = RmsNorm(transformer_config(), 32, eps=1e-6), Qwen2RMSNorm(32, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(32))
        reference.weight.copy_(norm.weight)
    x = torch.randn(5, 2, 32)
    torch.testing.assert_close(norm(x), reference(x))
    assert norm.weight.sequence_parallel is False


def test_norm_under_sequence_parallelism_is_marked(emulated) -> None:
    """Megatron sums the gradients of what carries this mark."""
    from megatron.core.distributed import finalize_model_grads

    from verl_speculator.platforms.megatron_cpu.layers import RmsNorm

    config = transformer_config()
    config.sequence_parallel = True
    assert RmsNorm(config, 32).weight.sequence_parallel is True
    assert '"sequence_parallel"' in Path(finalize_model_grads.__code__.co_filename).read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"attention_dropout": 0.1},
        {"window_size": (4, 0)},
        {"softmax_type": "off-by-one"},
        {"context_parallel_size": 2},
        {"normalization": "LayerNorm"},
        {"layernorm_zero_centered_gamma": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_layers_lack_is_refused(emulated, change) -> None:
    from verl_speculator.platforms.megatron_cpu.layers import CausalAttention, RmsNorm

    config = transformer_config(**change)
    with pytest.raises(ConfigError, match="on the CPU"):
        CausalAttention(config, 1), RmsNorm(config, 32)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v under a causal mask, of one sequence: [S, n, d], [S, g, d] and [S, g, d] to [S, n * d]."""
    length, heads, size = query.shape
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    scores = torch.einsum("snd,tnd->nst", query, key) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), value).flatten(1)


def test_attention_on_padded_input(emulated) -> None:
    from verl_speculator.platforms.megatron_cpu.layers import CausalAttention

    query, key, value = torch.randn(9, 3, 4, 8), torch.randn(9, 3, 2, 8), torch.randn(9, 3, 2, 8)
    attended = CausalAttention(transformer_config(), 1)(query, key, value)
    for row in range(3):
        expected = plain_attention(query[:, row], key[:, row], value[:, row])
        torch.testing.assert_close(attended[:, row], expected)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_on_packed_input(emulated, padded) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from verl_speculator.platforms.megatron_cpu.layers import CausalAttention

    query, key, value = (torch.randn(25, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    # Sequences may be filled up: then the ones with filling say where each begins.
    others = {"cu_seqlens_q": starts // 2, "cu_seqlens_q_padded": starts} if padded else {"cu_seqlens_q": starts}
    attended = CausalAttention(transformer_config(), 1)(
        query, key, value, packed_seq_params=PackedSeqParams(qkv_format="thd", **others)
    )
    parts = zip(*(states.split(LENGTHS) for states in (query, key, value)), strict=True)
    expected = torch.cat([plain_attention(*part) for part in parts])
    torch.testing.assert_close(attended, expected)
    weights = torch.randn_like(expected)
    for grad, reference in zip(
        torch.autograd.grad(attended, (query, key, value), weights),
        torch.autograd.grad(expected, (query, key, value), weights),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference)


# Models by mbridge


@pytest.mark.parametrize(
    ("family", "tie"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False), ("llama", False)]
)
def test_model_is_that_of_hugging_face(emulated, base_of, bridge_of, tmp_path, family, tie) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = base_of(family, tie)
    bridge = bridge_of(folder, torch.float32)
    (model,) = models = bridge.get_model(bf16=False)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    with torch.no_grad():
        bridge.load_weights(models, str(folder))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    tokens = torch.randint(VOCAB_SIZE, (3, 10))
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=None, attention_mask=None)
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=1e-5, atol=2e-5)

        starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        longest = max(LENGTHS)
        packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)
        tokens = torch.randint(VOCAB_SIZE, (1, sum(LENGTHS)))
        logits = model(input_ids=tokens, position_ids=None, attention_mask=None, packed_seq_params=packed)
        parts = [reference(part).logits[0] for part in tokens.split(LENGTHS, dim=1)]
    torch.testing.assert_close(logits[0], torch.cat(parts), rtol=1e-5, atol=2e-5)

    bridge.save_weights(models, str(tmp_path))
    saved, source = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(saved) == set(source)
    assert all(torch.equal(saved[name], source[name]) for name in source)


# The distributed optimizer


def build_training(bridge: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    is_bf16 = dtype is torch.bfloat16
    models = bridge.get_model(bf16=is_bf16, wrap_with_ddp=True)
    with torch.no_grad():
        bridge.load_weights(models, str(folder))
    config = OptimizerConfig(lr=1e-2, bf16=is_bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0)
    return models[0], get_megatron_optimizer(config, models)


def train(model: Any, optimizer: Any, step: int) -> None:
    from megatron.core.distributed import finalize_model_grads

    tokens = torch.randint(VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model.zero_grad_buffer()
    logits = model(input_ids=tokens, position_ids=None, attention_mask=None)
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    finalize_model_grads([model])
    optimizer.step()


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_resume_is_bit_exact(emulated, base_of, bridge_of, tmp_path, dtype, sharding) -> None:
    from mbridge.core.util import unwrap_model
    from megatron.core import dist_checkpointing

    folder, metadata = base_of("qwen2", True), {"distrib_optim_sharding_type": sharding}
    bridge = bridge_of(folder, dtype)

    def state(model: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
        parameters = unwrap_model(model).sharded_state_dict()
        return {
            "model": parameters,
            "optimizer": optimizer.sharded_state_dict(parameters, is_loading, metadata=metadata),
        }

    model, optimizer = build_training(bridge, folder, dtype)
    for step in range(2):
        train(model, optimizer, step)
    dist_checkpointing.save(state(model, optimizer, False), str(tmp_path))
    train(model, optimizer, 2)

    resumed, its_optimizer = build_training(bridge, folder, dtype)
    loaded = dist_checkpointing.load(state(resumed, its_optimizer, True), str(tmp_path))
    unwrap_model(resumed).load_state_dict(loaded["model"])
    its_optimizer.load_state_dict(loaded["optimizer"])
    train(resumed, its_optimizer, 2)
    for (name, parameter), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_a_training_step_is_that_of_adamw(emulated, base_of, bridge_of) -> None:
    """Megatron's data-parallel buffers and optimizer against torch's on the Hugging Face model."""
    from transformers import AutoModelForCausalLM

    folder = base_of("qwen3", True)
    model, optimizer = build_training(bridge_of(folder, torch.float32), folder, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [parameter for parameter in reference.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in reference.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for step in range(3):
        train(model, optimizer, step)
        tokens = torch.randint(VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(step))
        adamw.zero_grad()
        reference(tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adamw.step()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=None, attention_mask=None)
        torch.testing.assert_close(logits, reference(tokens).logits, rtol=1e-3, atol=1e-2)


# What else the engine does in the context


def test_fsdp_units_train_in_the_context_as_outside(platform) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def trained(context: Any) -> list[Tensor]:
        torch.manual_seed(5)
        unit = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
        with context:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            fully_shard(unit, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
            optimizer = torch.optim.AdamW(unit.parameters(), lr=0.1)
            for _ in range(3):
                unit(torch.ones(2, 8)).float().square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.full_tensor() for parameter in unit.parameters()]

    outside = trained(torch.enable_grad())
    inside = trained(platform.emulated_device())
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))
