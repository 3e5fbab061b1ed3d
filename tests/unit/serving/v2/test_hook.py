"""The hook where Model Runner V2 makes its speculator, and what it says when vLLM has moved."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest

from verl_speculator.serving.compatibility import UnsupportedEngineError
from verl_speculator.serving.speculative_config_hook import ATTRIBUTE, has_v2
from verl_speculator.serving.v2 import hook

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def package():
    if not has_v2():
        pytest.skip("this vLLM has no Model Runner V2 for us")
    return importlib.import_module(hook.PACKAGE)


def test_a_runner_that_is_loaded_already_is_hooked_too(package, monkeypatch) -> None:
    runner = SimpleNamespace(init_speculator=package.init_speculator)
    monkeypatch.setitem(sys.modules, hook.RUNNER, runner)
    hook.install()
    assert runner.init_speculator is package.init_speculator
    hook.install()
    assert runner.init_speculator is package.init_speculator


def test_what_is_not_ours_passes_through(monkeypatch) -> None:
    called = []
    wrapped = hook._ours_first(lambda *args: called.append(args))
    other = SimpleNamespace(speculative_config=SimpleNamespace(method="eagle3"))
    wrapped(other, "device", "states")
    assert called == [(other, "device", "states")]


def test_our_speculator_stands_where_vllms_would(monkeypatch) -> None:
    from verl_speculator.serving.v2 import speculator

    monkeypatch.setattr(speculator, "ChainDrafter", lambda *args: args)
    ours = SimpleNamespace(speculative_config=SimpleNamespace(**{ATTRIBUTE: object()}))
    assert hook._ours_first(lambda *_: pytest.fail("vLLM's own was made"))(ours, "device", "states") == (ours, "device")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("module", r"Model Runner V2 is not where it was \(.*build_dynamic_sd_schedule_lookup"),
        ("method", "DraftModelSpeculator has no sample_draft any more"),
        ("parameter", "has no parameter num_rejected, "),
        ("field", "InputBatch has no query_start_loc any more"),
    ],
)
def test_what_moved_is_named(what: str, sentence: str, monkeypatch) -> None:
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator, DraftModelSpeculator

    hook.check_interface()
    if what == "module":
        monkeypatch.delitem(sys.modules, "verl_speculator.serving.v2.speculator")
        monkeypatch.delattr("vllm.v1.spec_decode.dynamic.utils.build_dynamic_sd_schedule_lookup")
    elif what == "method":
        monkeypatch.delattr(DraftModelSpeculator, "sample_draft")
    elif what == "parameter":
        monkeypatch.setattr(BaseSpeculator, "propose", lambda self, input_batch, last_hidden_states, num_sampled: None)
    else:
        fields = {key: value for key, value in InputBatch.__dataclass_fields__.items() if key != "query_start_loc"}
        monkeypatch.setattr(InputBatch, "__dataclass_fields__", fields)
    with pytest.raises(UnsupportedEngineError, match=sentence):
        hook.check_interface()
