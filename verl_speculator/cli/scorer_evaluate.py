"""`verl-speculator scorer evaluate`: what acceptance rules save, and what they cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from verl_speculator.cli.arguments import add_data_arguments, add_import_argument, add_load_arguments, import_all
from verl_speculator.cli.progress import ProgressBars
from verl_speculator.cli.scorer_data import add_answer_arguments, add_batch_arguments, add_draft_arguments, load
from verl_speculator.errors import ConfigError

PURPOSE = "compare acceptance rules: tokens per target call, and accuracy (lossy)"
DESCRIPTION = """\
Decode prompts with each rule and strictly, and compare tokens per target call and the accuracy of the answers, question
by question. A rule without a number, and a scorer without a threshold, gets the setting that saves most on the
validation prompts while the loss of accuracy stays below the bound.

  verl-speculator scorer evaluate --base TARGET --draft DRAFT --validation val.parquet --data test.parquet \\
      --answers answer --accept probability --accept top-k --accept scorer:FOLDER --output evaluation.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to decode")
    add_data_arguments(what, limit=None)
    add_draft_arguments(what)
    add_import_argument(what)
    add_answer_arguments(what)
    what.add_argument(
        "--validation", action="append", default=[], metavar="FILE.parquet", help="chats on which settings are chosen"
    )
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--accept",
        action="append",
        required=True,
        metavar="RULE",
        help="such as probability:0.1, top-k, kl, margin, entropy, random, accept-all, "
        "scorer:FOLDER[+FOLDER][@THRESHOLD]; without a number its setting is chosen; LABEL=RULE names it; repeat for "
        "several",
    )
    rules.add_argument(
        "--accuracy-bound", type=float, default=0.01, help="of the loss, at 95 %% one-sided (default: %(default)s)"
    )
    rules.add_argument(
        "--threshold-places",
        type=int,
        nargs="+",
        default=[],
        metavar="PLACE",
        help="from these places of an answer on a scorer may get another threshold, chosen in the same way",
    )
    rules.add_argument(
        "--oracle", type=int, default=0, metavar="N", help="also what a rule that knew the future saves, on N prompts"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json", help="all figures")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write a page with charts and answers there")
    add_batch_arguments(parser.add_argument_group("how to decode"))
    add_load_arguments(parser.add_argument_group("how to load the models"))


def run(args: argparse.Namespace) -> None:
    from verl_speculator.scorer.comparison import ComparisonSettings, RuleSpec, compare_rules

    specs = [RuleSpec.parse(text) for text in args.accept]
    labels = [spec.label for spec in specs]
    if len(set(labels)) < len(labels):
        raise ConfigError("--accept: two rules have the same name; name them with LABEL=RULE")
    if not args.validation and any(spec.is_chosen for spec in specs):
        raise ConfigError("--validation: give chats on which the settings of the rules can be chosen")
    places = tuple(args.threshold_places)
    if list(places) != sorted(set(places)) or any(place < 1 for place in places):
        raise ConfigError(f"--threshold-places must be above 0 and in ascending order, not {list(places)}")
    import_all(args.imports)
    target = load(args)

    from verl_speculator.scorer.answers import AnswerCheck
    from verl_speculator.scorer.data import load_drafter, read_questions

    drafter = load_drafter(args.draft, args.base, target, args.num_drafts, args.quantization)
    options = {"messages_key": args.messages_key, "max_new_tokens": args.max_new_tokens}
    validation = read_questions(args.validation, args.answers, target, **options) if args.validation else []
    test = read_questions(args.data, args.answers, target, limit=args.num_prompts, **options)
    with ProgressBars() as bars:
        comparison = compare_rules(
            target,
            drafter,
            validation,
            test,
            specs,
            ComparisonSettings(
                num_drafts=args.num_drafts,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
                accuracy_bound=args.accuracy_bound,
                num_oracle=args.oracle,
                threshold_places=places,
            ),
            check=AnswerCheck(args.answer_pattern),
            report=bars.update,
        )
    from verl_speculator.reports.page import write_file
    from verl_speculator.reports.scorer import format_rules, write_page

    values = {"accuracy_bound": args.accuracy_bound, "target": args.base, "draft": args.draft, **comparison.to_dict()}
    write_file(args.output, json.dumps(values, indent=2) + "\n")
    print(format_rules(values))
    if args.report is not None:
        print(f"\nWrote {write_page(values, args.report)}: open it in a browser.")
