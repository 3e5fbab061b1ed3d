"""What verl asks of a platform, on the verl that is installed. One import of verl serves the whole file."""

from __future__ import annotations

import inspect

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with an accelerator the cpu platform stays out of the way"),
]
MOVED = "verl's platform interface has moved: look at verl_speculator/platforms/cpu.py"


@pytest.fixture(scope="module")
def cpu():
    import verl  # noqa: F401 - loads our plugin, which registers the platform

    from verl_speculator.platforms import cpu

    return cpu


def test_chosen_without_any_setting(cpu) -> None:
    from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform
    from verl.utils.device import get_device_id, get_device_name, get_torch_device

    assert isinstance(get_platform(), cpu.CpuPlatform)
    assert cpu.is_active()
    assert get_device_name() == "cpu"
    assert torch.empty(1, device=get_device_id()).device.type == "cpu"
    assert get_torch_device() is cpu.CpuPlatform.device_module
    assert PlatformRegistry.registered_names()[-1] == "cpu", "accelerators are asked first"


def test_registers_once(cpu) -> None:
    from verl.plugin.platform.platform_manager import PlatformRegistry

    names = PlatformRegistry.registered_names()
    cpu.ensure_registered()
    assert PlatformRegistry.registered_names() == names


def test_gives_way_to_an_accelerator(cpu, monkeypatch) -> None:
    assert cpu.CpuPlatform().is_platform_available(use_smi_check=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.CpuPlatform().is_platform_available(use_smi_check=True)


def test_has_everything_that_verl_declares(cpu) -> None:
    from verl.plugin.platform.platform_base import PlatformBase

    assert not cpu.CpuPlatform.__abstractmethods__, MOVED
    for name in PlatformBase.__abstractmethods__:
        declared, own = inspect.getattr_static(PlatformBase, name), getattr(cpu.CpuPlatform, name)
        if inspect.isfunction(declared):
            missing = set(inspect.signature(declared).parameters) - set(inspect.signature(own).parameters)
            assert not missing, f"{name} lacks {missing}. {MOVED}"


def test_every_method_answers(cpu) -> None:
    platform = cpu.CpuPlatform()
    assert platform.is_available()
    assert platform.device_count() == 1
    assert platform.communication_backend_name() == "gloo"
    assert platform.ray_resource_options(1) == {"num_gpus": 1}
    assert platform.get_device_capability() == (None, None)
    assert not platform.is_ipc_supported()
    platform.set_device(0)
    platform.synchronize()
    platform.empty_cache()
    with platform.nvtx_range("x"):
        pass
    for seed in (platform.manual_seed, platform.manual_seed_all):
        seed(3)
        first = torch.rand(2)
        seed(3)
        assert torch.equal(first, torch.rand(2))


def test_device_module_has_what_verl_calls_on_any_device(cpu) -> None:
    module = cpu.CpuPlatform.device_module
    assert module.max_memory_allocated() > module.memory_allocated() == 0
    free, total = module.mem_get_info()
    assert 0 < free <= total
    assert module.get_device_name() == "CPU"
    assert torch.equal(module.get_rng_state(), torch.get_rng_state())
    module.reset_peak_memory_stats()
    module.empty_cache()
    # The rest is torch.cpu's own.
    assert module.current_device() == torch.cpu.current_device()
    with module.stream(None):
        pass
    assert not hasattr(module, "no_such_function")


def test_verls_own_trainer_can_have_its_engine(cpu) -> None:
    """The demo trains its base model with it."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp import FSDPEngineWithLMHead

    for _ in range(2):
        cpu.enable_verl_engines()
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FSDPEngineWithLMHead


def test_configuration_keys_that_verl_reads_without_listing_them(cpu) -> None:
    """``+KEY`` is let through for these: verl must still read them."""
    from dataclasses import fields

    from verl.utils.dataset import multiturn_sft_dataset
    from verl.workers.config import FSDPEngineConfig

    from verl_speculator.trainer.config.compose import UNLISTED_KEYS

    names = {field.name for field in fields(FSDPEngineConfig)}
    source = inspect.getsource(multiturn_sft_dataset)
    for key in UNLISTED_KEYS:
        section, _, name = key.partition(".")
        assert name in names if section == "engine" else f'"{name}"' in source, key


def test_configuration_fits_the_typed_sections(cpu) -> None:
    from dataclasses import fields

    from verl.workers.config import FSDPEngineConfig

    from verl_speculator.engine.model_config import SpeculatorModelConfig
    from verl_speculator.engine.optimizer_config import SpeculatorFSDPOptimizerConfig
    from verl_speculator.trainer.config.compose import load_config

    config = load_config([])
    typed = {"model": SpeculatorModelConfig, "engine": FSDPEngineConfig, "optim": SpeculatorFSDPOptimizerConfig}
    for section, section_class in typed.items():
        unknown = {str(key) for key in config[section]} - {field.name for field in fields(section_class)} - {"_target_"}
        assert not unknown, f"{section_class.__name__} has no {unknown}"
