"""What follows from the device and from the data, on the machine that runs the tests."""

import pytest

from verl_speculator.errors import ConfigError
from verl_speculator.platforms import cpu
from verl_speculator.trainer.configuration import load_config
from verl_speculator.trainer.devices import apply_device

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
