"""A speculator on the Hugging Face hub: its model card, and the way there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_speculator.errors import ConfigError, MissingFileError
from verl_speculator.models import Speculator

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# What YAML and Markdown take literally.
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/+-]{0,95}")


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside what the speculator's own files hold; each field is a flag of `export`.

    Attributes:
        base: The base model's name on the hub; None takes the one that the speculator was trained with, if it is one.
        data: What it was trained on, in a few words or as a name on the hub.
        license: Under which it is published, such as `apache-2.0`.
        evaluation: The `eval.json` of `verl-speculator eval`, for the measured acceptance.

    Raises:
        ConfigError: A name that does not fit into a card.
    """

    base: str | None = None
    data: str | None = None
    license: str | None = None
    evaluation: Path | None = None

    def __post_init__(self) -> None:
        if self.base is not None:
            require_hub_name(self.base, "--base")
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ConfigError(f"--license: {self.license!r} is no name of a licence, such as apache-2.0")
        if self.data is not None and not _PLAIN.fullmatch(self.data):
            raise ConfigError(f"--data: {self.data!r} must be a few plain words: letters, digits, spaces and ._/+-")


def require_hub_name(name: str, flag: str) -> None:
    """Raise a ConfigError unless `name` has the form of a repository on the hub."""
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{flag}: {name!r} is no name on the hub; it has the form owner/name")


def model_card(speculator: Speculator, facts: CardFacts) -> str:
    """`README.md` of a repository on the hub.

    Raises:
        MissingFileError: There is no such `eval.json`.
        ConfigError: It is not one.
    """
    config = speculator.config
    # A path on the machine that trained it means nothing on the hub. What is no name of the hub's could be YAML, or a
    # command, where programs and readers take it from the card.
    trained_on = config.base_model_name_or_path
    base = facts.base or (trained_on if _HUB_NAME.fullmatch(trained_on) else None)
    is_dataset = facts.data is not None and _HUB_NAME.fullmatch(facts.data)
    head = {"library_name": "verl_speculator", "base_model": base, "license": facts.license}
    header = [f"{key}: {value}" for key, value in head.items() if value is not None]
    header += ["datasets:", f"- {facts.data}"] if is_dataset else []
    count = sum(parameter.numel() for parameter in speculator.parameters())
    lines = [
        f"# Speculator for {base or 'its base model'}",
        "",
        f"A speculator of the kind `{config.architectures[0]}` that drafts {config.n_predict} tokens:",
        f"{count / 1e6:.1f} M parameters, for a base model with hidden size {config.input_hidden_dim} and vocabulary",
        f"{config.vocab_size}.",
        *([f"Trained on {facts.data}."] if facts.data else []),
        "",
        "```bash",
        'pip install "verl_speculator[vllm]"',
        f"verl-speculator serve {base or 'BASE'} --speculator THIS_REPOSITORY",
        "```",
        *([] if facts.evaluation is None else ["", *_measured(facts.evaluation)]),
    ]
    return "\n".join(["---", *header, "---", "", *lines, ""])


def _measured(file: Path) -> list[str]:
    """The part of a card that an `eval.json` gives: its numbers, and how they came about."""
    if not file.is_file():
        raise MissingFileError(
            f"--eval: there is no file {str(file)!r}; `verl-speculator eval --report` writes eval.json"
        )
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        length, settings = values["acceptance_length"], values["settings"]
        interval = f"{length['mean']:.2f} ({length['low']:.2f} to {length['high']:.2f})"
        first, identical = values["speculators"][0], values["identical_outputs"]
        sampling = "greedy" if settings["temperature"] == 0 else f"temperature {float(settings['temperature'])}"
        outputs = {True: "all", False: "not all", None: "not compared, sampled"}[identical]
        return [
            "## Measured",
            "",
            "| | |",
            "| --- | --- |",
            f"| acceptance length (95 % over prompts) | {interval} |",
            f"| drafts a round | {int(first['num_draft_tokens'])} |",
            f"| outputs equal to plain decoding's | {outputs} |",
            f"| prompts, new tokens each | {int(values['num_prompts'])}, up to {int(settings['max_new_tokens'])} |",
            f"| decoding | {sampling} |",
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"--eval: {str(file)!r} is no eval.json of `verl-speculator eval` ({error!r})") from error


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload an exported folder to the repository `name`, which is made where it is not there; returns its address.

    The token is huggingface_hub's: `hf auth login`, or `HF_TOKEN`.

    Raises:
        ConfigError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(library_name="verl_speculator")
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Speculator by verl_speculator")
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"--push: no token for the hub: run `hf auth login`, or set HF_TOKEN ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--push: {name!r} could not be uploaded ({reason})") from error
    return str(address)
