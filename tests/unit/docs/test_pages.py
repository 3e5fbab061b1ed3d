"""What the pages say: their links lead somewhere, their code can be run, and the settings are those of the package."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from omegaconf import OmegaConf

from verl_speculator import cli

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else page.parent / unquote(path)
        assert linked.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(linked), f"{linked.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_and_json_are_well_formed(page: Path) -> None:
    for text in blocks(page, "python"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("verl_speculator"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
    for text in blocks(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_shell_is_well_formed(page: Path) -> None:
    for text in blocks(page, "bash"):
        result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{text}\n{result.stderr}"


def our_commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("verl-speculator ")]


@pytest.mark.parametrize("page", [page for page in PAGES if our_commands(page)], ids=str)
def test_our_commands_take_the_options_that_pages_give_them(page: Path, monkeypatch, tmp_path) -> None:
    reached = []
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"--import (\w+\.py)", page.read_text()):
        (tmp_path / file).write_text(blocks(page, "python")[0])
    for module in cli._COMMANDS.values():
        monkeypatch.setattr(module, "run", reached.append)
    for command in our_commands(page):
        try:
            status: object = cli.main(command)
        except SystemExit as leave:
            status = leave.code
        assert status == 0, f"verl-speculator {shlex.join(command)}"
    assert reached
    assert all(isinstance(args, argparse.Namespace) for args in reached)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_has_every_setting_and_its_default(hooks) -> None:
    def leaves(node, prefix: str = "") -> dict[str, object]:
        found = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            found.update(leaves(value, f"{name}.") if isinstance(value, dict) else {name: value})
        return found

    values = OmegaConf.to_container(OmegaConf.load(hooks.SETTINGS))
    values.pop("defaults")
    values["model"].pop("_target_")
    settings = {setting.key: setting for setting in hooks.read_settings(hooks.SETTINGS.read_text())}
    read = {key: OmegaConf.to_container(OmegaConf.create(f"x: {s.default}"))["x"] for key, s in settings.items()}
    assert read == leaves(values)
    assert settings["model.speculator.emb_dim"].meaning.startswith("Widths of the state")
    assert settings["model.speculator.scale_input"].meaning == "Normalise the base's hidden state first."
    for key in settings:
        assert f"| `{key}` |" in hooks.configuration_page()


def test_first_page_links_to_pages_only(hooks) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", hooks.first_page())
    local = {link.partition("#")[0] for link in links if not link.startswith("http")} - {""}
    assert {"training.md", "serving.md", "configuration.md"} <= local
    assert all((ROOT / "docs" / name).is_file() for name in local - {"configuration.md"})


def test_python_reference_names_what_there_is() -> None:
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert (
            importlib.util.find_spec(name)
            if module == "verl_speculator"
            else hasattr(importlib.import_module(module), attribute)
        )
