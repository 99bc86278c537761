#!/bin/sh
# Train a tokenizer in two processes, or on two GPUs where there are two: the batch of the config is divided among them,
# and the data order, the losses and the checkpoints are those of one process.
# examples/several_processes.sh SHARDS RUN [key=value ...]
set -eu
shards=$1 run=$2
shift 2
exec accelerate launch --num_processes "${PROCESSES:-2}" ${CPU:+--cpu} --module engine.cli \
    train tokenizer --config configs/quickstart/tokenizer_scq.yaml data.train="$shards" out="$run" "$@"
