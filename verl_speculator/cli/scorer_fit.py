"""`verl-speculator scorer fit`: a head learned from labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from verl_speculator.cli.arguments import add_load_arguments
from verl_speculator.cli.scorer_data import load

PURPOSE = "train a scorer's head on mined labels"
DESCRIPTION = """\
Train the head of a scorer on the labels of windows. It is a scorer as it is, and what RL starts from.

  verl-speculator scorer fit --base TARGET --windows labelled.parquet --output scorer

The folder holds the head (and LoRA) and its sizes, never the target. --linear makes it a logistic regression on the
target's states, as AutoJudge's (arXiv:2504.20039).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="BASE", help="the target that the windows are of")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file to use instead of the base's own"
    )
    parser.add_argument("--windows", required=True, type=Path, metavar="FILE.parquet", help="of `scorer label`")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the scorer")
    parser.add_argument("--linear", action="store_true", help="no hidden layer, and the target's states alone")
    parser.add_argument("--inner-dim", type=int, default=128, help="width of the head (default: %(default)s)")
    parser.add_argument("--num-layers", type=int, default=1, help="hidden layers of the head (default: %(default)s)")
    parser.add_argument("--lookahead", type=int, default=0, help="next drafts in view (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: on the frozen target's own states (default)")
    parser.add_argument("--lora-alpha", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="default: %(default)s")
    parser.add_argument(
        "--harm-weight", type=float, default=1.0, help="of a harmful mismatch beside a harmless one (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_load_arguments(parser.add_argument_group("how to load the target"))


def run(args: argparse.Namespace) -> None:
    from verl_speculator.scorer.config import ScoringModelConfig
    from verl_speculator.scorer.windows import read_windows

    file = read_windows(args.windows)
    target = load(args)

    import torch

    from verl_speculator.scorer.model import AutoModelForSPDScoring
    from verl_speculator.scorer.supervised import SupervisedSettings, fit_head

    config = ScoringModelConfig(
        hidden_size=target.model.get_output_embeddings().weight.shape[1],
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_model_path=str(Path(args.base).resolve()) if Path(args.base).exists() else args.base,
        inner_dim=args.inner_dim,
        num_layers=0 if args.linear else args.num_layers,
        # All that the windows know: two of them only where the drafter says how likely its tokens are.
        scalars=() if args.linear else file.scalars,
        lookahead=args.lookahead,
    )
    torch.manual_seed(args.seed)
    actor = AutoModelForSPDScoring.from_config(config, target.model)
    result = fit_head(
        actor,
        file,
        SupervisedSettings(
            num_epochs=args.epochs,
            learning_rate=args.lr,
            weight_decay=args.weight_decay,
            harm_weight=args.harm_weight,
            seed=args.seed,
        ),
    )
    actor.save_pretrained(args.output)
    print(
        f"Wrote {args.output}: learned from {result.num_mismatches} mismatches, best after epoch {result.best_epoch}; "
        f"on held-out prompts the loss is {result.validation_loss:.4f} and the area under the curve "
        f"{result.validation_auc:.4f}."
    )
