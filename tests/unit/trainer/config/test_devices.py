"""What follows from the device and from the data, on the machine that runs the tests."""

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.platforms import cpu
from verl_speculator.trainer.config import devices
from verl_speculator.trainer.config.compose import load_config
from verl_speculator.trainer.config.devices import apply_device

on_cpu = pytest.mark.skipif(not cpu.is_active(), reason="this machine has an accelerator")


@pytest.mark.parametrize(("files", "measured"), [([], False), (["data.val_files=val.parquet"], True)])
def test_acceptance_is_measured_where_there_is_something_to_measure_on(files, measured) -> None:
    config = load_config(files)
    apply_device(config)
    assert config.model.measure_sampled_acceptance is measured


@on_cpu
def test_a_cpu_computes_in_float32() -> None:
    config = load_config([])
    apply_device(config)
    assert (config.trainer.device, config.engine.model_dtype) == ("cpu", "fp32")
    assert config.engine.mixed_precision.param_dtype == "fp32"
    assert config.model.override_config.attn_implementation == "sdpa"


@on_cpu
def test_another_device_than_the_detected_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda, but verl finds cpu"):
        apply_device(load_config(["trainer.device=cuda"]))


ON_MEGATRON = ["engine=megatron", "optim=megatron"]


@pytest.fixture
def on(monkeypatch, installed):
    """Pretend that verl has detected a device, with mbridge installed."""
    installed("megatron.core", "mbridge")

    def detect(device: str) -> None:
        monkeypatch.setattr(devices, "get_device_name", lambda: device)

    return detect


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_number_type_with_megatron(on, device, dtype, joint) -> None:
    on(device)
    config = load_config([*ON_MEGATRON, f"model.freeze_base_model={not joint}".lower()])
    before = set(config.engine)
    apply_device(config)
    assert config.engine.model_dtype == dtype
    assert set(config.engine) == before, "FSDP's settings have no place here"
    given = load_config([*ON_MEGATRON, "engine.model_dtype=bf16"])
    apply_device(given)
    assert given.engine.model_dtype == "bf16"


def test_megatron_bridge_is_taken_where_it_is_installed(on, installed) -> None:
    def bridge(device: str, *overrides: str) -> bool:
        on(device)
        config = load_config([*ON_MEGATRON, *overrides])
        apply_device(config)
        return config.engine.vanilla_mbridge

    assert bridge("cuda") is True
    installed("megatron.core", "megatron.bridge", "mbridge")
    assert bridge("cuda") is False
    assert bridge("cuda", "engine.vanilla_mbridge=true") is True
    assert bridge("cpu") is True, "Megatron-Bridge needs a GPU"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("engine.context_parallel_size=2", "attention without TransformerEngine has no context parallelism"),
        ("engine.param_offload=true", "engine.param_offload=true has no meaning on CPU"),
        ("engine.optimizer_offload=true", "engine.optimizer_offload=true has no meaning on CPU"),
        ("engine.vanilla_mbridge=false", "engine.vanilla_mbridge=false cannot run on CPU"),
        ("optim.use_precision_aware_optimizer=true", "must be false on CPU: it needs TransformerEngine"),
    ],
)
def test_what_megatron_cannot_do_on_cpu(on, override, reason) -> None:
    config = [*ON_MEGATRON, override]
    on("cpu")
    with pytest.raises(ConfigError, match=reason):
        apply_device(load_config(config))
    on("cuda")
    apply_device(load_config(config))
