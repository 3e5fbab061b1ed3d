"""`verl-speculator scorer data`: where drafts and the target differ, as windows."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from verl_speculator.cli.arguments import add_data_arguments, add_import_argument, add_load_arguments, import_all
from verl_speculator.cli.progress import ProgressBars
from verl_speculator.errors import ConfigError, MissingFileError

PURPOSE = "run draft and target over prompts, and write where they differ"
DESCRIPTION = """\
Decode prompts speculatively and losslessly, and write a window for every round in which a draft differs from what the
target would have written: the context, the drafts, the target's tokens, and what is known of each mismatch.

  verl-speculator scorer data --base TARGET --draft DRAFT --data train.parquet --answers answer --output windows.parquet

DRAFT is a speculator or a language model with the target's tokenizer. Draft and target are loaded once each; where they
are the same folder, once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to decode")
    add_data_arguments(what, limit=None)
    add_draft_arguments(what)
    add_import_argument(what)
    add_answer_arguments(what)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.parquet", help="the windows")
    how = parser.add_argument_group("how to decode")
    add_batch_arguments(how)
    how.add_argument(
        "--explore",
        type=float,
        default=0.0,
        metavar="RATE",
        help="accept mismatches at random at this rate, so that windows also begin after accepted ones (default: 0)",
    )
    how.add_argument("--seed", type=int, default=0, help="of --explore (default: %(default)s)")
    add_load_arguments(parser.add_argument_group("how to load the models"))


def add_draft_arguments(group: Any) -> None:
    group.add_argument("--draft", required=True, metavar="FOLDER", help="a speculator, or a small language model")
    group.add_argument(
        "--num-drafts", "--num-draft-tokens", type=int, default=4, metavar="K", help="a round (default: %(default)s)"
    )


def add_answer_arguments(group: Any) -> None:
    group.add_argument(
        "--answers", required=True, metavar="COLUMN", help="column of the data with the reference answers"
    )
    add_pattern_argument(group)


def add_pattern_argument(group: Any) -> None:
    group.add_argument(
        "--answer-pattern",
        metavar="REGEX",
        help="whose first group is the answer in a text (default: '#### 12', '\\boxed{12}', 'answer is 12', or the "
        "last number)",
    )


def add_batch_arguments(group: Any) -> None:
    group.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=64, help="prompts at once (default: %(default)s)")


def load(args: argparse.Namespace) -> Any:
    """The target that the flags name."""
    from verl_speculator.base_model.files import check_base_files
    from verl_speculator.base_model.settings import LoadSettings

    for name in ("max_new_tokens", "batch_size", "num_drafts"):
        if getattr(args, name, 1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    settings = LoadSettings(**{name: getattr(args, name) for name in LoadSettings.__dataclass_fields__})
    template = getattr(args, "chat_template", None)
    check_base_files(args.base, key="--base", template_key="--chat-template FILE", has_template=template is not None)
    if getattr(args, "draft", None) is not None and not Path(args.draft).is_dir():
        raise MissingFileError(f"--draft: there is no folder {args.draft!r}")

    from verl_speculator.base_model.loading import load_target, load_tokenizer_and_config

    tokenizer, _ = load_tokenizer_and_config(args.base, settings, template)
    return load_target(args.base, settings, tokenizer)


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.explore <= 1:
        raise ConfigError(f"--explore={args.explore} is a probability: it must be from 0 to 1")
    import_all(args.imports)
    target = load(args)

    from verl_speculator.scorer.answers import AnswerCheck
    from verl_speculator.scorer.data import collect_windows, load_drafter, read_questions
    from verl_speculator.scorer.windows import write_windows

    drafter = load_drafter(args.draft, args.base, target, args.num_drafts, args.quantization)
    questions = read_questions(
        args.data,
        args.answers,
        target,
        messages_key=args.messages_key,
        limit=args.num_prompts,
        max_new_tokens=args.max_new_tokens,
    )
    with ProgressBars() as bars:
        windows, scalars, counts = collect_windows(
            target,
            drafter,
            questions,
            num_drafts=args.num_drafts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            check=AnswerCheck(args.answer_pattern),
            explore=args.explore,
            seed=args.seed,
            report=bars.update,
        )
    info = {
        "target": args.base,
        "draft": args.draft,
        "num_drafts": args.num_drafts,
        "max_new_tokens": args.max_new_tokens,
        "explore": args.explore,
        "counts": asdict(counts),
    }
    write_windows(args.output, windows, scalars, info)
    print(
        f"Wrote {args.output}: {counts.num_windows} windows with {counts.num_mismatches} mismatches of "
        f"{counts.num_prompts} prompts; {counts.num_rounds_without_mismatch} rounds had none. The target answers "
        f"{counts.num_strict_correct} rightly; of {counts.num_unanswered} answers none could be extracted."
    )
