"""The flags of ``verl-speculator eval`` and ``train-report``. Imports nothing heavy: ``--help`` is to be instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verl_speculator.base_model.settings import DEVICE_MAPS, DTYPES
from verl_speculator.evaluation.settings import DRAFT_SAMPLING, EvaluationInput, EvaluationSettings

EVAL_DESCRIPTION = """\
Measure speculators on the prompts of chat data: decode each prompt with the base model alone and with the speculator,
and report tokens per target forward (acceptance length), whether the output stayed the same, and the speed-up.

  verl-speculator eval --base BASE --speculator FOLDER --data test.parquet --report out/

Several --speculator are compared side by side. --report writes eval.json and index.html, which opens in any browser.
"""
REPORT_DESCRIPTION = """\
Plot a training run as one HTML file that opens in any browser: loss, accuracy per head, acceptance length, learning
rate, gradient norm, speed. RUN_DIR is the run's trainer.default_local_dir, a metrics log, or TensorBoard's folder.
"""
_DEFAULTS = EvaluationSettings()


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument("--base", required=True, metavar="BASE", help="base model: a Hugging Face folder or name")
    what.add_argument(
        "--speculator",
        required=True,
        action="append",
        type=Path,
        metavar="FOLDER",
        help="a speculator/ folder or a global_step_N that holds one; repeat to compare",
    )
    what.add_argument(
        "--data", required=True, action="append", metavar="FILE.parquet", help="chats; repeat for several files"
    )
    what.add_argument("--messages-key", default=_DEFAULTS.messages_key, help="column of chats (default: %(default)s)")
    what.add_argument(
        "--num-prompts", type=int, default=_DEFAULTS.num_prompts, help="the first N rows (default: %(default)s)"
    )
    what.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja file to use instead of the base's own")
    what.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a file that registers a speculator type of your own",
    )
    output = parser.add_argument_group("what to leave behind")
    output.add_argument("--report", type=Path, metavar="FOLDER", help="write eval.json and index.html there")
    output.add_argument(
        "--run-dir",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="a training run whose curves the report shows; default: the run that the speculator lies in",
    )
    how = parser.add_argument_group("how to decode")
    how.add_argument("--max-new-tokens", type=int, default=_DEFAULTS.max_new_tokens, help="default: %(default)s")
    how.add_argument("--num-draft-tokens", type=int, metavar="K", help="drafted per round (default: n_predict)")
    how.add_argument(
        "--batch-size", type=int, default=_DEFAULTS.batch_size, help="prompts at once (default: %(default)s, as a chat)"
    )
    how.add_argument(
        "--temperature", type=float, default=_DEFAULTS.temperature, help="0 is greedy (default: %(default)s)"
    )
    how.add_argument("--top-p", type=float, default=_DEFAULTS.top_p, help="default: %(default)s")
    how.add_argument("--top-k", type=int, default=_DEFAULTS.top_k, help="0 is off (default: %(default)s)")
    how.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="of sampling (default: %(default)s)")
    how.add_argument(
        "--draft-sampling",
        choices=DRAFT_SAMPLING,
        default=_DEFAULTS.draft_sampling,
        help="how the speculator drafts when the target samples (default: %(default)s)",
    )
    add_load_arguments(parser.add_argument_group("how to load the base"))


def add_load_arguments(group: Any) -> None:
    """The flags of `LoadSettings`, for every command that decodes."""
    group.add_argument(
        "--dtype", choices=DTYPES, default=_DEFAULTS.dtype, help="auto: float32 on a CPU, else the base's own"
    )
    group.add_argument(
        "--device", default=_DEFAULTS.device, help="such as cpu or cuda:0 (default: an accelerator if any)"
    )
    group.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the base's layers over all accelerators (default: only if it does not fit on one)",
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a base on the hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="such as eager, sdpa or flash_attention_2 (default: transformers')",
    )


def add_train_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a training run's folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    return EvaluationSettings(
        **{name: getattr(args, name) for name in EvaluationSettings.__dataclass_fields__ if hasattr(args, name)}
    )


def input_of(args: argparse.Namespace) -> EvaluationInput:
    return EvaluationInput(
        base=args.base,
        speculators=tuple(args.speculator),
        data=tuple(args.data),
        chat_template=args.chat_template,
    )
