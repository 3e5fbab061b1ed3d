from __future__ import annotations

import pytest

from verl_speculator.cli.eval import import_file
from verl_speculator.errors import ConfigError, MissingFileError
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
    import_file(tmp_path / "own_type_of_a_test.py")
    values = {"architectures": ["OwnSpeculatorOfATest"], "input_hidden_dim": 8, "vocab_size": 9}
    assert type(SpeculatorConfig.from_dict(values)).__name__ == "OwnConfig"


def test_file_that_cannot_be_imported(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=r"^--import: there is no file"):
        import_file(tmp_path / "absent.py")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ConfigError, match="is not a Python file"):
        import_file(tmp_path / "text.txt")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"broken\.py' fails with ZeroDivisionError"):
        import_file(tmp_path / "broken.py")
