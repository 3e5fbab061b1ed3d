"""Finding the adapter that a configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_speculator.adapters import (
    LSTMSpeculatorAdapter,
    MLPSpeculatorAdapter,
    SpeculatorAdapter,
    build_speculator_adapter,
    load_adapter_class,
)
from verl_speculator.errors import ConfigError

FQN = "verl_speculator.adapters.MLPSpeculatorAdapter"
OWN = """
from verl_speculator.adapters import MLPSpeculatorAdapter
class Own(MLPSpeculatorAdapter): ...
"""


@pytest.fixture
def own_file(tmp_path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


@pytest.mark.parametrize("spec", [FQN, {"fqn": FQN}, OmegaConf.create({"fqn": FQN})])
def test_dotted_name(spec) -> None:
    adapter = build_speculator_adapter(spec, {"n_predict": 2})
    assert type(adapter) is MLPSpeculatorAdapter
    assert adapter.settings == {"n_predict": 2}


def test_dotted_name_of_the_module() -> None:
    name = "verl_speculator.adapters.lstm_adapter.LSTMSpeculatorAdapter"
    assert load_adapter_class(name) is LSTMSpeculatorAdapter


@pytest.mark.parametrize(("module", "adapter"), [("lstm", LSTMSpeculatorAdapter), ("mlp", MLPSpeculatorAdapter)])
def test_names_of_verls_own_trainer(module, adapter) -> None:
    name = f"verl.trainer.speculators.{module}_adapter.{adapter.__name__}"
    assert load_adapter_class(name) is adapter
    assert load_adapter_class({"fqn": name}) is adapter


def test_file_that_registers_a_name(tmp_path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from verl_speculator.models import MLPSpeculator, Speculator, SpeculatorConfig\n"
        "from verl_speculator.models.mlp_speculator import MLPSpeculatorConfig\n"
        "@SpeculatorConfig.register('own_of_a_test')\n"
        "class Config(MLPSpeculatorConfig):\n    speculators_model_type = 'own_of_a_test'\n    architectures = ()\n"
        "@Speculator.register('own_of_a_test')\nclass Model(MLPSpeculator): ...\n"
    )
    found = load_adapter_class({"path": str(file), "name": "own_of_a_test"})
    assert found.speculator_class.__name__ == "Model"
    assert load_adapter_class({"path": str(file), "name": "Model"}).speculator_class is found.speculator_class
    with pytest.raises(ConfigError, match=r"has no class 'absent' and registers no speculator of that name"):
        load_adapter_class({"path": str(file), "name": "absent"})


def test_file(own_file) -> None:
    found = load_adapter_class({"path": str(own_file), "name": "Own"})
    assert issubclass(found, MLPSpeculatorAdapter)
    # One class however often it is asked for: a speculator type may register only once.
    assert load_adapter_class(OmegaConf.create({"path": str(own_file), "name": "Own"})) is found


def test_files_of_one_name_are_kept_apart(own_file, tmp_path) -> None:
    other = tmp_path / "other" / "own.py"
    other.parent.mkdir()
    other.write_text(OWN)
    classes = [load_adapter_class({"path": str(file), "name": "Own"}) for file in (own_file, other)]
    assert classes[0] is not classes[1]


def test_module_in_the_current_folder(own_file, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(own_file.parent))
    own_file.rename(own_file.with_name("adapter_module_of_a_user.py"))
    assert load_adapter_class("adapter_module_of_a_user.Own").__name__ == "Own"


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('broken')", "import no_such_module", "def (", "import sys; undefined"]
)
def test_file_that_fails(tmp_path, monkeypatch, text) -> None:
    file = tmp_path / "failing_adapter_of_a_user.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in ({"path": str(file), "name": "Own"}, "failing_adapter_of_a_user.Own"):
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"^model\.speculator_adapter: .* cannot be imported \(\w+Error: "):
                load_adapter_class(spec)


@pytest.mark.parametrize(
    "spec", [None, 3, [], {}, {"fqn": FQN, "name": "x"}, {"path": "x.py"}, {"name": "x"}, {"path": "x", "fqn": FQN}]
)
def test_spec_of_no_known_form(spec) -> None:
    with pytest.raises(ConfigError, match=r"must be a dotted name, {fqn: dotted\.name} or {path: file\.py, "):
        load_adapter_class(spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("NoDots", "must be a full dotted name"),
        (".", "must be a full dotted name"),
        ("..Adapter", "cannot be imported"),
        ("no_such_package.Adapter", "No module named 'no_such_package'"),
        ("verl_speculator.adapters.Missing", "module verl_speculator.adapters has no 'Missing'"),
        ("verl_speculator.adapters.load_adapter_class", "is no adapter"),
        ("torch.nn.Module", "is no adapter"),
        ("verl_speculator.adapters.SpeculatorAdapter", "is no complete adapter; it must define"),
        ({"path": "/absent.py", "name": "Own"}, "there is no file '/absent.py'"),
    ],
)
def test_name_that_is_no_adapter(spec, reason) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        load_adapter_class(spec)
    assert str(caught.value).startswith("model.speculator_adapter")


def test_the_four_methods_of_the_design_are_all_that_an_adapter_must_have() -> None:
    assert SpeculatorAdapter.__abstractmethods__ == {
        "build_speculator_module",
        "get_optimizer_params",
        "compute_speculator_logits",
        "compute_speculator_loss",
    }
