"""Every override that cannot be right gets an answer that names what would be."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import (
    check_overrides,
    chosen_engine,
    known_keys,
    load_config,
    parse_override,
)

ON_MEGATRON = ["engine=megatron", "optim=megatron"]


@pytest.fixture(scope="module")
def keys():
    return {"fsdp": known_keys(load_config([])), "megatron": known_keys(load_config(ON_MEGATRON))}


@pytest.fixture
def check(keys):
    """Checks overrides of a run with FSDP, or with another engine."""

    def run(*overrides: str, engine: str = "fsdp") -> None:
        check_overrides(list(map(parse_override, overrides)), engine, keys.__getitem__)

    return run


@pytest.fixture
def refused(check):
    """The message with which an override is refused."""

    def run(override: str, **engine: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check(override, **engine)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


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


def test_setting_of_the_speculator(refused, check) -> None:
    assert "did you mean model.speculator.n_predict?" in refused("model.speculator.n_predcit=1")
    assert "did you mean model.speculator.n_predict?" in refused("model.speculator={n_predcit: 1}")
    # Another adapter may have it: that adapter says whether.
    check("+model.speculator.n_predcit=1", "++model.speculator.depth=2")
    assert "+model.speculator.depth=..." in refused("model.speculator.depth=2")


@pytest.mark.parametrize(
    "override",
    [
        "+data.shuffle=true",
        "+engine.mixed_precision.param_dtype=fp32",
        "+model.override_config.attn_implementation=sdpa",
    ],
)
def test_what_verl_reads_without_listing_it_can_be_added(refused, check, override) -> None:
    check(override)
    assert "add it with a plus sign, +" in refused(override[1:])


def test_added_key_that_exists(refused) -> None:
    assert refused("+optim.lr=1") == "optim.lr is there already: write optim.lr=... without the plus sign"


@pytest.mark.parametrize("override", ["engine=foo", "engine=null", "+engine=fsdp", "engine@engine=fsdp"])
def test_wrong_engine(refused, override) -> None:
    assert "engine must be fsdp or megatron, as in engine=fsdp" in refused(override)


@pytest.mark.parametrize(
    ("groups", "engine"),
    [([], "fsdp"), (["engine=fsdp"], "fsdp"), (["optim=fsdp", "engine.seed=1"], "fsdp"), (ON_MEGATRON, "megatron")],
)
def test_the_engine_is_the_one_that_both_groups_name(groups, engine) -> None:
    assert chosen_engine(list(map(parse_override, groups))) == engine


@pytest.mark.parametrize(
    ("groups", "pair"),
    [
        (["engine=megatron"], "engine=megatron does not go with optim=fsdp"),
        (["engine=megatron", "optim=fsdp"], "engine=megatron does not go with optim=fsdp"),
        (["optim=megatron"], "engine=fsdp does not go with optim=megatron"),
    ],
)
def test_one_group_without_the_other(groups, pair) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(groups)
    assert str(caught.value) == f"{pair}: give both engine=megatron and optim=megatron, or neither"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("engine.tensor_parallel_size", "engine.tensor_model_parallel_size"),
        ("engine.pipeline_paralel_size", "engine.pipeline_model_parallel_size"),
        ("engine.tp", "engine.tensor_model_parallel_size"),
        ("engine.pp", "engine.pipeline_model_parallel_size"),
        ("tp", "engine.tensor_model_parallel_size"),
        ("engine.modeldtype", "engine.model_dtype"),
        (
            "engine.override_transformer_config.recompute_granularty",
            "engine.override_transformer_config.recompute_granularity",
        ),
        ("engine.overide_ddp_config.overlap_grad_reduce", "engine.override_ddp_config"),
        ("optim.lr_decay_stile", "optim.lr_decay_style"),
        ("optim.minlr", "optim.min_lr"),
    ],
)
def test_unknown_key_of_megatron_is_answered_with_the_nearest(refused, wrong, right) -> None:
    message = refused(f"{wrong}=1", engine="megatron")
    assert message == f"{wrong} is not a configuration key; did you mean {right}?"


@pytest.mark.parametrize(
    "key",
    [
        "engine.override_transformer_config.num_layers_in_first_pipeline_stage",
        "engine.override_ddp_config.overlap_grad_reduce",
        "engine.override_mcore_model_config.some",
        "optim.override_optimizer_config.adam_eps",
    ],
)
def test_what_megatron_reads_without_listing_it_can_be_added(check, refused, key) -> None:
    check(f"+{key}=1", engine="megatron")
    assert (
        refused(f"{key}=1", engine="megatron")
        == f"{key} is not among the defaults: add it with a plus sign, +{key}=..."
    )


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("engine.ulysses_sequence_parallel_size", "with engine=megatron set engine.context_parallel_size"),
        ("engine.mixed_precision", "with engine=megatron set engine.model_dtype"),
        ("engine.fsdp_size", "leave it out with engine=megatron"),
        ("engine.wrap_policy", "leave it out with engine=megatron"),
        ("optim.lr_scheduler_type", "with engine=megatron set optim.lr_decay_style"),
        ("optim.min_lr_ratio", "with engine=megatron set optim.min_lr"),
    ],
)
def test_settings_of_fsdp_given_with_megatron(refused, plus, key, instead) -> None:
    message = refused(f"{plus}{key}=1", engine="megatron")
    assert message == f"{key} is a setting of engine=fsdp: {instead}"
    assert refused(f"{plus}{key}.part=1", engine="megatron") == message


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("engine.tensor_model_parallel_size", "give engine=megatron optim=megatron to train on Megatron"),
        ("engine.override_transformer_config", "give engine=megatron optim=megatron to train on Megatron"),
        ("engine.context_parallel_size", "with engine=fsdp set engine.ulysses_sequence_parallel_size"),
        ("optim.lr_decay_style", "with engine=fsdp set optim.lr_scheduler_type"),
    ],
)
def test_settings_of_megatron_given_with_fsdp(refused, key, instead) -> None:
    assert refused(f"{key}=1").startswith(f"{key} is a setting of engine=megatron: {instead}")
    mistyped = key.replace("_", "", 1)
    assert refused(f"{mistyped}=1").endswith(f"did you mean {key}, of engine=megatron?")


def test_the_other_engines_settings_inside_a_dictionary(refused) -> None:
    assert refused("engine={fsdp_size: 2}", engine="megatron").startswith(
        "engine.fsdp_size is a setting of engine=fsdp"
    )


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
    assert parse_override(f"data.train_files={value}").value() == value


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("value", ["1024.2048", "1024.2050", "8.16.32"])
def test_dotted_width_is_a_string(plus, value) -> None:
    for typed in (value, f'"{value}"', f"'{value}'"):
        assert parse_override(f"{plus}model.speculator.inner_dim={typed}").value() == value


def test_other_numbers_stay_numbers() -> None:
    assert parse_override("optim.lr=0.10").value() == 0.1
    assert parse_override("model.speculator.inner_dim=512").value() == 512


def test_dictionary_values_are_looked_into(refused) -> None:
    assert "did you mean optim.lr?" in refused("optim={lrr: 1}")
    assert "did you mean data.custom_cls.path?" in refused("data={custom_cls: {pth: x}}")


def test_interpolations_are_no_sections() -> None:
    config = OmegaConf.create({"a": {"b": 1}, "c": "${a}"})
    check_overrides([parse_override("c=1"), parse_override("a.b=2")], "fsdp", lambda engine: known_keys(config))
