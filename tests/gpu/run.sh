#!/usr/bin/env bash
# Everything that only a GPU can tell, within 400 seconds and offline:
#
#   bash tests/gpu/run.sh OUT [SHAPE]        from the project's root; SHAPE: 8b (default), 7b, 14b, tiny
#
# First the tests and the recipes beside each other, then one large model alone, so that its timings mean something.
# OUT/summary.txt says how each part ended as soon as it has, OUT/parts.txt holds the end of each part's log.
# "tiny" tries the script on any machine: few of the tests, and ten times the time. Where there is no GPU everything runs
# on the CPU.
set -um # -m: or what runs in the background ignores interrupts
out=$(realpath -m "${1:?usage: bash tests/gpu/run.sh OUT [SHAPE]}") shape=${2:-8b} logs=$(mktemp -d)
mkdir -p "$out"
slower=1 parity=tests/parity trainer=tests/integration/test_ppo_trainer.py large=()
if [ "$shape" = tiny ]; then
    slower=10 parity=tests/parity/test_forward.py trainer="$trainer -k checkpoint"
    large=(--prompt_tokens 64 --new_tokens 64 --written 16)
fi
first=$((150 * slower)) all=$((390 * slower)) # seconds: what runs side by side, and everything
[ -e /dev/nvidiactl ] && device=cuda || device=cpu
cores=$(nproc)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TRL_EXT_TEST_DEVICE=${TRL_EXT_TEST_DEVICE:-$device}
export TRL_EXT_CACHE=${TRL_EXT_CACHE:-$PWD/.ci/cache} # where the tests have it: the demo is built once
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 COLUMNS=160
export OMP_NUM_THREADS=1

# left END: seconds until then, at least one: for timeout 0 is for ever.
left() { echo $(($1 > SECONDS ? $1 - SECONDS : 1)); }

say() { echo "$@" | tee -a "$out/summary.txt"; }

# telling LOG: the lines of it that belong in the summary.
telling() {
    tr '\r' '\n' <"$1" | grep -E '^(\||FAILED|ERROR|SKIPPED|E  )|exam (before|after)|held-out pair|passed|failed|under the profiler' |
        cut -c1-260 | tail -n 90
}

# part NAME SECONDS COMMAND...: run it, no longer than that, and say at once how it ended.
part() {
    local name=$1 limit=$2 since=$SECONDS rc
    shift 2
    # Interrupted, pytest still says what failed; a benchmark that is ended says where it was.
    timeout -s "${stop:-INT}" -k 8 "$limit" "$@" >"$logs/$name.log" 2>&1
    rc=$?
    { echo "=== $name"; tr '\r' '\n' <"$logs/$name.log" | cut -c1-400 | tail -n 60; } >"$logs/$name.tail"
    { flock 9; cat "$logs"/*.tail >"$out/parts.txt"
      say "== $name: rc $rc, from $since to $SECONDS s"
      telling "$logs/$name.log" | tee -a "$out/summary.txt"; } 9>"$logs/lock"
}

tests() { # PARALLEL PATH...
    local parallel=$1
    shift
    python3 -m pytest -q --no-header --disable-warnings --tb=short -rfEs -p no:cacheprovider -o faulthandler_timeout=60 \
        --continue-on-collection-errors -n "$((cores * parallel / 16 > 1 ? cores * parallel / 16 : 1))" "$@"
}
export -f tests
export cores

: >"$out/summary.txt"
say "shape $shape, device $TRL_EXT_TEST_DEVICE, $cores cores, C compiler: $(command -v cc gcc clang | head -n 1)"
part versions "$first" python3 - <<'P' &
import importlib.metadata as m, platform, torch
print("|", platform.python_version(), "|", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU", "| CUDA", torch.version.cuda)
for name in "torch triton trl transformers peft bitsandbytes accelerate datasets kernels flash_attn hypothesis".split():
    try:
        print("|", name, m.version(name))
    except m.PackageNotFoundError:
        print("|", name, "is missing")
P
part precisions "$first" bash -c 'tests 3 tests/gpu' &
part parity "$first" bash -c "tests 8 $parity" &
part trainer "$first" bash -c "tests 5 $trainer" &
{
    part reward_nf4 "$first" python3 recipes/reward_lora.py --load_in_4bit --num_train_epochs 2 --output_dir "$logs/reward"
    part ppo_nf4 "$(left "$first")" python3 recipes/ppo_lora.py --load_in_4bit --total_episodes 384 \
        --reward_adapter "$logs/reward" --output_dir "$logs/ppo"
} &
part dpo_nf4 "$first" python3 recipes/dpo_lora.py --load_in_4bit --num_train_epochs 1 --output_dir "$logs/dpo" &
wait

# Goals at 8B: under 20 GiB with 8 rows, under 10 GiB with one.
OMP_NUM_THREADS=$cores stop=TERM part large "$(left "$all")" python3 tests/benchmarks/large_models.py --shape "$shape" \
    --rows 8 1 --profile --limit "$((75 * slower))" --work "$logs/large" ${large[@]+"${large[@]}"} --variants \
    plain "bf16 adapters" "continuous batching" "continuous batching, CUDA graphs" "static cache"
say "done after $SECONDS s"
