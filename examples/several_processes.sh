#!/bin/sh
# Train a tokenizer on two GPUs, or with CPU=1 in two processes on a machine without a GPU. The processes share the
# config's batch. The data order and the checkpoints are the same as with one process.
# examples/several_processes.sh SHARDS RUN [key=value ...]        PROCESSES=8 for more
set -eu
shards=$1 run=$2
shift 2
if [ -n "${CPU:-}" ]; then # without a GPU, accelerate's launcher starts only one process; torch's starts them all
    export ACCELERATE_USE_CPU=true
    start="torchrun --standalone --nproc_per_node ${PROCESSES:-2} -m"
else
    start="accelerate launch --num_processes ${PROCESSES:-2} --module"
fi
exec $start scq train tokenizer --config configs/quickstart/tokenizer_scq.yaml \
    data.train="$shards" out="$run" "$@"
