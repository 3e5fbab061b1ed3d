from __future__ import annotations

import argparse
import importlib
import json

import pytest

from tests.unit.reports.conftest import make_drafter, make_result
from verl_speculator import cli
from verl_speculator.cli.arguments import import_all
from verl_speculator.errors import ConfigError
from verl_speculator.models import SpeculatorConfig

TYPE = """
from __future__ import annotations
from dataclasses import dataclass
from verl_speculator.models import SpeculatorConfig

@dataclass(kw_only=True)
class OwnConfig(SpeculatorConfig):
    architectures = ("OwnSpeculatorOfATest",)
"""


def test_file_of_the_user_registers_its_type(tmp_path) -> None:
    (tmp_path / "own_type_of_a_test.py").write_text(TYPE)
    import_all([str(tmp_path / "own_type_of_a_test.py")])
    values = {"architectures": ["OwnSpeculatorOfATest"], "input_hidden_dim": 8, "vocab_size": 9}
    assert type(SpeculatorConfig.from_dict(values)).__name__ == "OwnConfig"


def test_file_that_cannot_be_imported(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"^--import: there is no file"):
        import_all([str(tmp_path / "absent.py")])
    with pytest.raises(ConfigError, match=r"^--import: 'no_such_module' cannot be imported"):
        import_all(["no_such_module"])
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ConfigError, match="is not a Python file"):
        import_all([str(tmp_path / "text.txt")])
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"broken\.py' cannot be imported \(ZeroDivisionError"):
        import_all([str(tmp_path / "broken.py")])


@pytest.fixture
def run_eval(monkeypatch):
    """`verl-speculator eval` on a result that was measured elsewhere."""

    def run(result, *more: str) -> int:
        monkeypatch.setattr("verl_speculator.evaluation.preflight.check_input", lambda *_: None)
        monkeypatch.setattr("verl_speculator.evaluation.run.evaluate", lambda *_, **__: result)
        return cli.main(["eval", "--base", "b", "--speculator", "s", "--data", "d", *more])

    return run


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (None, 0), (False, 1)])
def test_status_says_whether_outputs_differ(identical, status, run_eval) -> None:
    one, two = make_drafter("one", [[1]]), make_drafter("two", [[1]], identical_outputs=identical, num_identical=0)
    assert run_eval(make_result(one, two)) == status
    assert run_eval(make_result(one, prompt_lookup=two)) == status
    assert run_eval(make_result(one, two), "--allow-differences") == 0


def test_json_on_standard_output_is_all_that_stands_there(run_eval, tmp_path, capsys) -> None:
    result = make_result(notes=["said to people"])
    assert run_eval(result, "--json", "-", "--report", str(tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "out" / "eval.json").read_text()) == result.to_dict()
    assert "acceptance length" in captured.err
    assert "note: said to people" in captured.err
    assert "Wrote" in captured.err


def test_json_in_a_file(run_eval, tmp_path, capsys) -> None:
    assert run_eval(make_result(), "--json", str(tmp_path / "x.json")) == 0
    assert json.loads((tmp_path / "x.json").read_text())["num_prompts"] == 2
    assert "acceptance length" in capsys.readouterr().out
    assert run_eval(make_result(), "--json", str(tmp_path / "absent" / "x.json")) == 2
    assert capsys.readouterr().err.startswith("error: --json: there is no folder")


@pytest.mark.parametrize(
    ("command", "given", "values"),
    [
        ("eval", ["--limit", "7"], {"num_prompts": 7}),
        ("eval", ["--num-prompts", "7"], {"num_prompts": 7}),
        ("eval", ["--num-draft-tokens", "2", "--num-draft-tokens", "1"], {"num_draft_tokens": [2, 1]}),
        ("eval", ["--num-speculative-tokens", "2"], {"num_draft_tokens": [2]}),
        ("regenerate", ["--limit", "7"], {"num_prompts": 7}),
        ("regenerate", ["--num-prompts", "7"], {"num_prompts": 7}),
        ("serve", ["--num-draft-tokens", "2"], {"num_draft_tokens": 2}),
        ("serve", ["--num-speculative-tokens", "2"], {"num_draft_tokens": 2}),
        ("serve", ["--base", "elsewhere"], {"base": "elsewhere"}),
    ],
)
def test_options_have_the_same_names_everywhere(command, given, values) -> None:
    needed = {
        "eval": ["--base", "b", "--speculator", "s", "--data", "d"],
        "regenerate": ["--base", "b", "--data", "d", "--output", "o"],
        "serve": ["--speculator", "s"],
    }
    parser = argparse.ArgumentParser()
    importlib.import_module(f"verl_speculator.cli.{command}").add_arguments(parser)
    args = parser.parse_args([*needed[command], *given])
    assert {name: getattr(args, name) for name in values} == values
