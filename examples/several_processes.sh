#!/bin/sh
# Train a tokenizer on two GPUs, or with CPU=1 in two processes of a machine without: the batch of the config is divided
# among them, and the data order and the checkpoints are those of one process.
# examples/several_processes.sh SHARDS RUN [key=value ...]        PROCESSES=8 for more
set -eu
shards=$1 run=$2
shift 2
if [ -n "${CPU:-}" ]; then # accelerate's launcher starts one process only where there is no GPU; torch's starts them all
    export ACCELERATE_USE_CPU=true
    start="torchrun --standalone --nproc_per_node ${PROCESSES:-2} -m"
else
    start="accelerate launch --num_processes ${PROCESSES:-2} --module"
fi
exec $start scq train tokenizer --config configs/quickstart/tokenizer_scq.yaml \
    data.train="$shards" out="$run" "$@"
