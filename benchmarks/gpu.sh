#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes on one GPU, without a network:
#   (a) the tests marked `cuda`;
#   (b) captured decoding against eager decoding and a forward pass: GPT-2, Llama and Falcon with ALiBi, bf16 and float32;
#   (c) rollout and whole PPO batch at GPT-2 small and at a Llama of 1.2 B, beside `generate` and TRL's PPO, as ratios,
#       with the share of the memory-bandwidth limit;
#   (d) one JSON of all that, written anew after each part: a part that fails or takes too long costs the others nothing.
#
#   bash benchmarks/gpu.sh [--output FILE] [--trl FOLDER] [--parts PART ...] [--seconds 480]
#
# Needs Python >= 3.10 and the wheels torch (with CUDA), lightning, transformers, torchmetrics, sacrebleu, matplotlib and
# tensorboard, with what they require. The package itself runs from this checkout. Used where they are there: pytest
# (without it (a) says so and is left out) and peft (without it the tests with LoRA are skipped). TRL is used where it
# can be imported, or from the wheels in FOLDER (trl 1.12.0 and what it lacks here: accelerate, datasets, pandas, pyarrow,
# dill, multiprocess, xxhash, psutil); otherwise its rows say that it is missing.
# PYTHON names the interpreter; the models (random weights, 6 GB on a GPU) are kept in XDG_CACHE_HOME, by default ~/.cache.
# Without CUDA the same runs in a minute with tiny shapes and the static step uncaptured: to see that it works.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec timeout --kill-after=5 480 "${PYTHON:-python3}" "$here/gpu.py" "$@"
