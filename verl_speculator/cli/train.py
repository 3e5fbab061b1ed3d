"""`verl-speculator train`: from overrides to torchrun, or to Ray."""

from __future__ import annotations

import argparse
import os
import sys

PURPOSE = "train a speculator on chat data"
DESCRIPTION = """\
Train a speculator. Settings are Hydra overrides on verl's sft_trainer_engine; the most used ones:

  model.partial_pretrain=BASE              base model: a Hugging Face folder or name
  data.train_files=train.parquet           chat data: a column `messages` of {role, content}
  data.val_files=test.parquet
  model.speculator.n_predict=5             tokens drafted ahead
  model.speculator.method=sum_rnn          or sum_lstm
  model.speculator.inner_dim=1024          also emb_dim and proj_dim; "1024.2048" is a stack
  trainer.default_local_dir=FOLDER         where checkpoints go
  engine=megatron optim=megatron           the base on Megatron; engine.tensor_model_parallel_size=2

Everything is checked before a process is started. On several machines run torchrun yourself:
  torchrun --nnodes=2 ... -m verl_speculator.trainer.sft_trainer key=value ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, help="processes on this machine; default: one for each GPU, at least 1")
    parser.add_argument("--ray", action="store_true", help="run the workers under Ray instead of torchrun")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")


def run(args: argparse.Namespace) -> None:
    from omegaconf import OmegaConf

    from verl_speculator.trainer.config.compose import load_config
    from verl_speculator.trainer.launch import launch

    overrides = [*args.overrides, *args.rest]
    # As under torchrun: an adapter in the current folder can be named.
    sys.path.insert(0, os.getcwd())
    if args.print_config:
        print(OmegaConf.to_yaml(load_config(overrides)), end="")
    else:
        launch(overrides, num_processes=args.nproc, use_ray=args.ray)
