#!/usr/bin/env bash
# Train a speculator of any type for Qwen2.5-0.5B-Instruct on GSM8K, on either engine.
#
#   ./prepare_gsm8k.py
#   [TYPE=eagle3] [ENGINE=fsdp] ./run_qwen_05_speculator_engine.sh NPROC SAVE_PATH [key=value ...]
#
# TYPE is a speculator type (lstm, mlp, eagle3, dflash, or your own with --import), ENGINE fsdp or megatron. DATA_DIR
# names another folder for the parquet files. Options of `verl-speculator train` may stand among the settings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

check_arguments "run_qwen_05_speculator_engine.sh NPROC SAVE_PATH [key=value ...]" "$@"
nproc=$1
save_path=$2
shift 2

data_dir=${DATA_DIR:-$HOME/data/gsm8k}
command=$(find_command verl-speculator)
exec "$command" train --nproc "$nproc" --engine "${ENGINE:-fsdp}" \
    --speculator-type "${TYPE:-eagle3}" \
    --verifier-name-or-path Qwen/Qwen2.5-0.5B-Instruct \
    --data-path "$data_dir/train.parquet" \
    --val-data-path "$data_dir/test.parquet" \
    --save-path "$save_path" \
    --epochs 3 \
    --val-freq after_each_epoch \
    --checkpoint-freq after_each_epoch \
    trainer.experiment_name=qwen-05-gsm8k \
    "$@"
