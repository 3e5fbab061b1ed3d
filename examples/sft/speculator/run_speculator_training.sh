#!/usr/bin/env bash
# Train a speculator on this machine.
#
#   ./run_speculator_training.sh NPROC SAVE_PATH [key=value ...]
#
# NPROC is the number of processes (one per GPU), SAVE_PATH the folder for the checkpoints; what follows are settings,
# such as data.train_files=train.parquet. Without data.train_files it is ~/data/gsm8k/train.parquet, which
# ../gsm8k/prepare_gsm8k.py writes. Relative paths start from the folder you call this from.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

check_arguments "run_speculator_training.sh NPROC SAVE_PATH [key=value ...]" "$@"
nproc=$1
save_path=$2
shift 2

command=$(find_command verl-speculator)
exec "$command" train --nproc "$nproc" "trainer.default_local_dir=$(hydra_string "$save_path")" "$@"
