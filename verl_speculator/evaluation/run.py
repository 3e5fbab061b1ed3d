"""An evaluation from folders to results."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from verl_speculator import __version__
from verl_speculator.base_model.loading import (
    Target,
    explain_out_of_memory,
    load_target,
    load_tokenizer_and_config,
    pick_device,
)
from verl_speculator.data.chats import read_chats
from verl_speculator.data.prompts import Prompt, encode_chats, name_rows, split_by_length
from verl_speculator.decoding import NgramDrafter
from verl_speculator.errors import ConfigError, naming
from verl_speculator.evaluation.measure import Drafting, Report, held_out_loss, measure
from verl_speculator.evaluation.preflight import check_input, read_speculator_configs, speculator_folder
from verl_speculator.evaluation.results import DrafterResult, EvaluationResult
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings, label_paths
from verl_speculator.evaluation.summary import summarize_drafting, summarize_target
from verl_speculator.models import Speculator
from verl_speculator.scorer.answers import read_answers
from verl_speculator.scorer.rule import load_rule


def evaluate(
    base: str | os.PathLike[str],
    speculators: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    settings: EvaluationSettings | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> EvaluationResult:
    """Measure `speculators` on the prompts of chat files, each prompt decoded with and without drafts.

    Args:
        report: Is told what is being done, how much of it is done and how much there is.

    Raises:
        SpeculatorError: Something cannot work; all that can be known before is found before a model is loaded.
    """
    files = [data] if isinstance(data, str | os.PathLike) else list(data)
    given = EvaluationInput(
        base=str(base),
        speculators=tuple(str(path) for path in speculators),
        data=tuple(str(file) for file in files),
        chat_template=None if chat_template is None else Path(chat_template),
    )
    if not given.speculators:
        raise ConfigError("--speculator: give at least one speculator folder")
    settings = settings or EvaluationSettings()
    check_input(given, settings)
    return _evaluate(given, settings, report or (lambda doing, done, total: None))


def _evaluate(given: EvaluationInput, settings: EvaluationSettings, report: Report) -> EvaluationResult:
    pick_device(settings.device)  # one that is not there is said before anything is read
    tokenizer, config = load_tokenizer_and_config(given.base, settings, given.chat_template)
    # Again: of a base on the hub, the sizes are known only now.
    configs = read_speculator_configs(given, settings, (config.hidden_size, config.vocab_size))
    prompts = encode_chats(read_chats(given.data, settings.messages_key, settings.num_prompts), tokenizer)
    prompts, too_long = split_by_length(
        prompts, getattr(config, "max_position_embeddings", None), settings.max_new_tokens
    )

    with explain_out_of_memory("loading the models", "use --dtype bfloat16, or a device with more memory"):
        target = load_target(given.base, settings, tokenizer)
        longest = max(max(settings.num_draft_tokens, default=config.n_predict) for config in configs)
        lookup = Drafting("prompt lookup", NgramDrafter(longest), longest)
        speculators = _load_speculators(given, settings, target)
        # Lossy ones last: what stands first in a report is lossless.
        drafted = [*speculators, *_with_rules(speculators, settings, target), lookup]
    measurement = measure(target, drafted, prompts, settings, report)
    loss, loss_tokens = held_out_loss(target, prompts, settings, report)
    answers = read_answers(given.data, settings.answers) if settings.answers is not None else None
    *results, baseline = [
        summarize_drafting(measurement, drafting, prompts, target, is_greedy=settings.is_greedy, answers=answers)
        for drafting in drafted
    ]
    return EvaluationResult(
        base=given.base,
        data=list(given.data),
        num_prompts=len(prompts),
        num_skipped=len(too_long),
        settings={**asdict(settings), "dtype": str(target.dtype).removeprefix("torch."), "device": str(target.device)},
        versions={
            "verl_speculator": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        machine=_machine(target.device),
        target=summarize_target(measurement, loss, loss_tokens, prompts, target, answers),
        speculators=results,
        prompt_lookup=baseline,
        notes=[*_skipped_note(too_long, settings), *_notes(given, drafted, results, target)],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _load_speculators(given: EvaluationInput, settings: EvaluationSettings, target: Target) -> list[Drafting]:
    drafted = []
    for path, label in zip(given.speculators, label_paths(given.speculators), strict=True):
        with naming("--speculator"):
            speculator = Speculator.from_pretrained(
                speculator_folder(path), dtype=target.dtype, device=target.device
            ).eval()
        counts = settings.num_draft_tokens or (speculator.n_predict,)
        drafted += [
            Drafting(
                label=label if len(counts) == 1 else f"{label}, {count} draft{'s' if count > 1 else ''}",
                drafter=speculator,
                num_draft_tokens=count,
                draft_sampling="random" if settings.draft_sampling == "random" else "greedy",
                path=Path(path),
                num_parameters=sum(parameter.numel() for parameter in speculator.parameters()),
            )
            for count in counts
        ]
    return drafted


def _with_rules(speculators: Sequence[Drafting], settings: EvaluationSettings, target: Target) -> list[Drafting]:
    """Each speculator with each acceptance rule, under a name that says that this is lossy."""
    with naming("--accept"):
        rules = [(text, load_rule(text, target.model)) for text in settings.accept]
    return [
        replace(way, label=f"{way.label}, lossy {text}", rule=text, accepts=rule, results=[], seconds=[])
        for way in speculators
        for text, rule in rules
    ]


def _skipped_note(too_long: Sequence[Prompt], settings: EvaluationSettings) -> list[str]:
    if not too_long:
        return []
    return [
        f"{name_rows(too_long)} left out: too long for the base's context with "
        f"--max-new-tokens={settings.max_new_tokens}."
    ]


def _notes(
    given: EvaluationInput, drafted: Sequence[Drafting], results: Sequence[DrafterResult], target: Target
) -> list[str]:
    """What a reader should know that is no error."""
    notes = []
    for drafting, result in zip(drafted[: len(results)], results, strict=True):
        if result.lossy_rule is not None:
            notes.append(
                f"{result.label} kept {result.num_lossy_accepted} drafts that the target would not have written: its "
                "outputs are not the target's own."
            )
            continue
        trained_on = drafting.drafter.config.base_model_name_or_path
        if trained_on and not _same_model(trained_on, given.base):
            notes.append(f"{result.label} was trained on {trained_on!r} and is measured on {given.base!r}.")
        if result.identical_outputs is False:
            differ = len(result.prompts) - (result.num_identical or 0)
            why = (
                "greedy decoding in float32 should not differ"
                if target.dtype == torch.float32
                else f"in {str(target.dtype).removeprefix('torch.')} rounding can do that, and --dtype float32 tells"
            )
            notes.append(
                f"{result.label}: {differ} of {len(result.prompts)} outputs differ from plain decoding; {why}."
            )
    return notes


def _same_model(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
