#!/usr/bin/env bash
# Train an LSTM speculator for Qwen2.5-0.5B-Instruct on GSM8K with torchrun, the base model on Megatron.
#
#   ./prepare_gsm8k.py
#   ./run_qwen_05_speculator_megatron.sh NPROC SAVE_PATH [key=value ...]
#
# TP and PP cut the base model: TP over its 14 attention heads (1 or 2), PP over its 24 layers; what is left of NPROC is
# data parallel. Needs `pip install 'verl_speculator[megatron]'`.
#
# DATA_DIR names another folder for the parquet files. On several machines start it on each, with NPROC the processes of
# one machine, SAVE_PATH on a file system they share, and NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

check_arguments "run_qwen_05_speculator_megatron.sh NPROC SAVE_PATH [key=value ...]" "$@"
nproc=$1
save_path=$2
shift 2

nnodes=${NNODES:-1}
if [[ $nnodes -gt 1 ]]; then
    : "${NODE_RANK:?NNODES=$nnodes needs NODE_RANK, the number of this machine from 0 on}"
    : "${MASTER_ADDR:?NNODES=$nnodes needs MASTER_ADDR, the address of machine 0}"
    launcher=(--nnodes="$nnodes" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR"
        --master_port="${MASTER_PORT:-29500}")
else
    launcher=(--standalone)
fi

data_dir=${DATA_DIR:-$HOME/data/gsm8k}
torchrun=$(find_command torchrun)
exec "$torchrun" "${launcher[@]}" --nproc_per_node="$nproc" -m verl_speculator.trainer.sft_trainer \
    engine=megatron \
    optim=megatron \
    engine.tensor_model_parallel_size="${TP:-1}" \
    engine.pipeline_model_parallel_size="${PP:-1}" \
    model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \
    model.speculator.method=sum_lstm \
    model.speculator.n_predict=3 \
    model.speculator.scale_input=true \
    data.train_files="$(hydra_string "$data_dir/train.parquet")" \
    data.val_files="$(hydra_string "$data_dir/test.parquet")" \
    trainer.default_local_dir="$(hydra_string "$save_path")" \
    trainer.experiment_name=qwen-05-gsm8k-megatron \
    trainer.total_epochs=3 \
    trainer.test_freq=after_each_epoch \
    trainer.save_freq=after_each_epoch \
    "$@"
