"""Every override that cannot be right gets an answer that names what would be."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.configuration import load_config
from verl_speculator.trainer.overrides import check_overrides, known_keys, parse_overrides


@pytest.fixture(scope="module")
def known():
    return known_keys(load_config([]))


@pytest.fixture
def refused(known):
    """The message with which an override is refused."""

    def check(override: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_overrides(parse_overrides([override]), known)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return check


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.freeze_base", "model.freeze_base_model"),
        ("model.spekulator.n_predict", "model.speculator.n_predict"),
        ("model.speculator_adaptor", "model.speculator_adapter"),
        ("data.trian_files", "data.train_files"),
        ("data.micro_batch_size", "data.micro_batch_size_per_gpu"),
        ("trainer.total_epoch", "trainer.total_epochs"),
        ("trainer.save_path", "trainer.default_local_dir"),
        ("optim.lrr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("engine.stratgy", "engine.strategy"),
        ("engine.ulysses_parallel_size", "engine.ulysses_sequence_parallel_size"),
        ("engine.wrap_policy.min_num_param", "engine.wrap_policy.min_num_params"),
        ("checkpoint.save_content", "checkpoint.save_contents"),
        ("n_predict", "model.speculator.n_predict"),
        ("lr", "optim.lr"),
        ("trianer.total_epochs", "trainer.total_epochs"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(refused, plus, wrong, right) -> None:
    assert refused(f"{plus}{wrong}=1") == f"{wrong} is not a configuration key; did you mean {right}?"


def test_key_without_likeness_is_answered_with_what_there_is(refused) -> None:
    assert "optim has optimizer, optimizer_impl, lr," in refused("optim.xyz=1")
    assert "the sections are model, engine, optim" in refused("xyz=1")
    assert "_target_" not in refused("optim.xyz=1")


def test_setting_of_the_speculator(refused, known) -> None:
    assert "did you mean model.speculator.n_predict?" in refused("model.speculator.n_predcit=1")
    assert "did you mean model.speculator.n_predict?" in refused("model.speculator={n_predcit: 1}")
    # Another adapter may have it: that adapter says whether.
    check_overrides(parse_overrides(["+model.speculator.n_predcit=1", "++model.speculator.depth=2"]), known)
    assert "+model.speculator.depth=..." in refused("model.speculator.depth=2")


@pytest.mark.parametrize(
    "override",
    [
        "+data.shuffle=true",
        "+engine.mixed_precision.param_dtype=fp32",
        "+model.override_config.attn_implementation=sdpa",
    ],
)
def test_what_verl_reads_without_listing_it_can_be_added(refused, known, override) -> None:
    check_overrides(parse_overrides([override]), known)
    assert "add it with a plus sign, +" in refused(override[1:])


def test_added_key_that_exists(refused) -> None:
    assert refused("+optim.lr=1") == "optim.lr is there already: write optim.lr=... without the plus sign"


@pytest.mark.parametrize("override", ["engine=foo", "engine=megatron", "+engine=fsdp", "engine@engine=fsdp"])
def test_wrong_engine(refused, override) -> None:
    assert "engine must be fsdp" in refused(override)


@pytest.mark.parametrize(("group", "choice"), [("optim", "fsdp"), ("model", "hf_model"), ("profiler", "profiler")])
def test_wrong_group(refused, group, choice) -> None:
    assert f"{group} must be {choice}" in refused(f"{group}=foo")


def test_section_instead_of_key(refused) -> None:
    assert "trainer is a section: set the keys in it, which are default_local_dir," in refused("trainer=3")
    assert "model.speculator is a section" in refused("model.speculator=null")


@pytest.mark.parametrize("override", ["~optim.lr", "~engine"])
def test_removal(refused, override) -> None:
    assert f"{override[1:]} cannot be removed" in refused(override)


@pytest.mark.parametrize("override", ["a b", "optim.lr", "--multirun", "data.train_files=[a", "optim.lr='1"])
def test_no_key_value(refused, override) -> None:
    assert "is not a setting in the form key=value" in refused(override)


def test_sweep(refused) -> None:
    assert "write a list as [a,b]" in refused("data.train_files=a.parquet,b.parquet")


@pytest.mark.parametrize(
    "value", ["~/data/x.parquet", "/a=b/c d.parquet", "/è.parquet", "/it's.parquet", "/x(1).parquet"]
)
def test_value_that_is_no_hydra_expression_is_taken_as_typed(value) -> None:
    assert parse_overrides([f"data.train_files={value}"])[0].value() == value


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("value", ["1024.2048", "1024.2050", "8.16.32"])
def test_dotted_width_is_a_string(plus, value) -> None:
    for typed in (value, f'"{value}"', f"'{value}'"):
        assert parse_overrides([f"{plus}model.speculator.inner_dim={typed}"])[0].value() == value


def test_other_numbers_stay_numbers() -> None:
    assert parse_overrides(["optim.lr=0.10"])[0].value() == 0.1
    assert parse_overrides(["model.speculator.inner_dim=512"])[0].value() == 512


def test_dictionary_values_are_looked_into(refused) -> None:
    assert "did you mean optim.lr?" in refused("optim={lrr: 1}")
    assert "did you mean data.custom_cls.path?" in refused("data={custom_cls: {pth: x}}")


def test_interpolations_are_no_sections() -> None:
    config = OmegaConf.create({"a": {"b": 1}, "c": "${a}"})
    check_overrides(parse_overrides(["c=1", "a.b=2"]), known_keys(config))
