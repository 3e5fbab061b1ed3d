"""What the CPU answers in CUDA's place while Megatron runs, and that nothing stays behind."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from verl_speculator.errors import ConfigError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron runs on the CPU only without an accelerator"),
]
MOVED = "the installed version has moved: look at verl_speculator/platforms/megatron_cpu"


@pytest.fixture(scope="module")
def platform():
    pytest.importorskip("megatron.core", reason="needs megatron-core")
    pytest.importorskip("mbridge", reason="needs mbridge")
    from verl_speculator.platforms import megatron_cpu

    megatron_cpu.install()
    return megatron_cpu


@pytest.fixture
def emulated(platform):
    with platform.emulated_device():
        yield


# The context


def installed_values(patches: list) -> list[Any]:
    return [vars(owner)[name] for owner, name, _ in patches]


def test_everything_is_back_when_the_context_ends(platform) -> None:
    patches = platform._patches
    before = [*installed_values(patches), torch.autograd._engine_run_backward]
    replacements = [patch.replacement for patch in patches]
    assert not set(map(id, before)) & set(map(id, replacements))

    def fail_inside() -> None:
        with platform.emulated_device():
            with platform.emulated_device():
                assert installed_values(patches) == replacements
            assert installed_values(patches) == replacements
            assert torch.ones(1).cuda().device.type == "cpu", "the inner context has not ended the outer one"
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    after = [*installed_values(patches), torch.autograd._engine_run_backward]
    assert all(one is other for one, other in zip(before, after, strict=True))
    for call in (lambda: torch.ones(1).cuda(), lambda: torch.ones(1, device="cuda"), torch.cuda.current_device):
        with pytest.raises((AssertionError, RuntimeError)):
            call()
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_a_model_leaves_no_choice_of_attention_behind(platform, monkeypatch) -> None:
    """Megatron refuses a choice that differs from what the variables say, in the processes started from here too."""
    from megatron.core.models.common.language_module import language_module

    from verl_speculator.platforms.megatron_cpu import environment

    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    monkeypatch.delenv("NVTE_FLASH_ATTN", raising=False)
    with platform.emulated_device():
        assert not {name for name in os.environ if name.startswith("NVTE_")}
        source = inspect.getsource(language_module)
        assert all(name in source for name in environment.ATTENTION_VARIABLES), MOVED
        os.environ["NVTE_FLASH_ATTN"] = "0"
    assert os.environ["NVTE_FUSED_ATTN"] == "1"
    assert "NVTE_FLASH_ATTN" not in os.environ


def test_installs_once(platform) -> None:
    count = len(platform._patches)
    platform.install()
    assert len(platform._patches) == count


def test_must_be_installed(platform, monkeypatch) -> None:
    monkeypatch.setattr(platform, "_patches", [])
    with pytest.raises(RuntimeError, match="install"), platform.emulated_device():
        pass


def test_gives_way_to_an_accelerator(platform, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="no accelerator"):
        platform.install()


def test_replacements_take_the_arguments_of_what_they_replace(platform) -> None:
    for owner, name, replacement in platform._patches:
        original = vars(owner).get(name)
        assert original is not None, f"{owner.__name__}.{name} is gone. {MOVED}"
        if not inspect.isfunction(original):
            continue
        own = inspect.signature(replacement).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            continue
        asked = {
            name
            for name, parameter in inspect.signature(original).parameters.items()
            if parameter.kind < parameter.VAR_KEYWORD
        }
        assert not asked - set(own), f"{owner.__name__}.{name} takes {asked - set(own)} too. {MOVED}"


def test_an_attribute_that_is_gone_is_named(platform) -> None:
    from verl_speculator.platforms.megatron_cpu.patches import Patch, patched

    stays = torch.cuda.synchronize
    with (
        pytest.raises(RuntimeError, match=r"torch.cuda has no 'no_such_call'"),
        patched([Patch(torch.cuda, "synchronize", None), Patch(torch.cuda, "no_such_call", None)]),
    ):
        pass
    assert torch.cuda.synchronize is stays


# Tensors and torch.cuda


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_tensors_made_for_the_device_are_on_the_cpu(emulated, device) -> None:
    x = torch.arange(3.0)
    made = [
        torch.zeros(3, device=device),
        torch.tensor([0.0, 0.0, 0.0], device=device),
        torch.full_like(x, 0.0, device=device),
        x.new_zeros(3, device=device),
        torch.arange(3, device=device) * 0.0,
    ]
    for tensor in made:
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, torch.zeros(3))
    assert torch.equal(x.to(device), x)
    assert torch.equal(x.to(device, torch.float64, non_blocking=True), x.double())
    assert torch.equal(x.to(device=device), x)
    assert x.cuda(0) is x
    assert torch.zeros(3, device="meta").is_meta


def test_modules_keep_their_parameters(emulated) -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight
    weight.sequence_parallel = True
    assert layer.cuda(torch.cuda.current_device()).weight is weight
    assert layer.weight.sequence_parallel


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "Float"), (torch.bfloat16, "BFloat16"), (torch.float16, "Half")]
)
def test_types_have_the_names_that_megatron_compares(emulated, dtype, name) -> None:
    from megatron.core.optimizer import distrib_optimizer

    expected = f"torch.cuda.{name}Tensor"
    assert torch.ones(1, dtype=dtype).type() == expected
    assert f"'{expected}'" in inspect.getsource(distrib_optimizer), MOVED
    assert torch.ones(1).type(dtype).dtype is dtype, "a conversion is still one"


def test_cuda_calls(emulated) -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.current_device() == torch.device("cpu")
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    state, drawn = torch.cuda.get_rng_state(), torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(3)))
    torch.set_rng_state(state)
    assert torch.equal(drawn, torch.rand(2))


class _AsksForTheDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.cuda() * torch.full((1,), 2.0, device="cuda")


@pytest.mark.parametrize("how", ["tensor", "autograd", "grad", "engine"])
def test_the_backward_pass_is_in_the_context(emulated, how) -> None:
    x = torch.ones(3, requires_grad=True)
    loss = _AsksForTheDevice.apply(x).sum()
    if how == "tensor":
        loss.backward()
    elif how == "autograd":
        torch.autograd.backward(loss)
    elif how == "grad":
        (x.grad,) = torch.autograd.grad(loss, x)
    else:
        from megatron.core.pipeline_parallel.schedules import custom_backward

        custom_backward(loss, None)
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_compiled_functions_run_as_they_are_written(platform) -> None:
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def double(x: Tensor) -> Tensor:
        return x * 2

    with platform.emulated_device():
        assert double(torch.ones(1)).item() == 2
    assert not compilations
    double(torch.ones(1))
    assert len(compilations) == 1, "outside of the context torch.compile is itself"


# Random states


def test_random_states_keep_their_place(emulated, caplog) -> None:
    """The reference is a generator of its own for each state, seeded as Megatron documents it."""
    from megatron.core.tensor_parallel import random

    random.model_parallel_cuda_manual_seed(7, tp_rank=1, ep_rank=0, etp_rank=0, force_reset_rng=True)
    tracker = random.get_cuda_rng_tracker()
    everywhere = torch.Generator().manual_seed(7)
    of_this_rank = torch.Generator().manual_seed(7 + 2718 + 1)
    of_data = torch.Generator().manual_seed(7)

    def drawn(generator: torch.Generator) -> None:
        assert torch.equal(torch.rand(4), torch.rand(4, generator=generator))

    drawn(everywhere)
    for _ in range(2):
        with tracker.fork():
            drawn(of_this_rank)
            with tracker.fork("data-parallel-rng"):
                drawn(of_data)
                with tracker.fork():
                    drawn(of_this_rank)
            drawn(of_this_rank)
        drawn(everywhere)
    with pytest.raises(KeyError, match="no-such-state"), tracker.fork("no-such-state"):
        pass
    assert not [record for record in caplog.records if "CPU RNG state" in record.message]


def test_recomputed_activations_draw_the_same_numbers(emulated) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    random.model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    x = torch.ones(64, requires_grad=True)

    def dropped(x: Tensor) -> Tensor:
        with random.get_cuda_rng_tracker().fork():
            return nn.functional.dropout(x, 0.5)

    y = tensor_parallel.checkpoint(dropped, False, x)
    y.sum().backward()
    assert 0 < y.count_nonzero() < 64
    assert torch.equal(x.grad, y.detach())
