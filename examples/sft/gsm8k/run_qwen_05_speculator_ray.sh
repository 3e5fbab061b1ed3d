#!/usr/bin/env bash
# Train an LSTM speculator for Qwen2.5-0.5B-Instruct on GSM8K with Ray workers.
#
#   ./prepare_gsm8k.py
#   ./run_qwen_05_speculator_ray.sh NPROC SAVE_PATH [key=value ...]
#
# DATA_DIR names another folder for the parquet files. On several machines start a Ray cluster (`ray start --head`, then
# `ray start --address=...` on the others) and run this once, on the head, with NPROC the processes of one machine,
# trainer.nnodes=N, and SAVE_PATH on a file system they share.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

check_arguments "run_qwen_05_speculator_ray.sh NPROC SAVE_PATH [key=value ...]" "$@"
nproc=$1
save_path=$2
shift 2

data_dir=${DATA_DIR:-$HOME/data/gsm8k}
command=$(find_command verl-speculator)
exec "$command" train --ray --nproc "$nproc" \
    model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
    model.speculator.method=sum_lstm \
    model.speculator.n_predict=3 \
    model.speculator.scale_input=true \
    data.train_files="$(hydra_string "$data_dir/train.parquet")" \
    data.val_files="$(hydra_string "$data_dir/test.parquet")" \
    trainer.default_local_dir="$(hydra_string "$save_path")" \
    trainer.experiment_name=qwen-05-gsm8k-ray \
    trainer.total_epochs=3 \
    trainer.test_freq=after_each_epoch \
    trainer.save_freq=after_each_epoch \
    "$@"
