#!/usr/bin/env bash
# Times conversion and perplexity side by side with llama.cpp on this machine's CPU, in turns, and prints medians and
# ratios. Whole processes, files in the page cache; machines are noisy, so quote the ratios.
#
# usage: scripts/speed.sh WORK_DIR MODEL_DIR [RUNS]      RUNS: 5;  needs scripts/peers.sh WORK_DIR/peers (or PEERS=DIR)
#        QUANT=program to time, built if not given;  THREADS=2 for perplexity (conversion is timed with one)
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
model=$(cd "$2" && pwd)
runs=${3:-5}
peers=${PEERS:-$work/peers}
threads=${THREADS:-2}
text=${TEXT:-$repository/eval/eval.txt}
windows=${WINDOWS:-20}
if [ -z "${QUANT:-}" ]; then
  cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
  QUANT=${CARGO_TARGET_DIR:-$repository/target}/release/quant
fi
name=$(basename "$model")
bf16=${BF16:-$work/$name-bf16.gguf}
[ -f "$bf16" ] || "$peers/venv/bin/python" "$repository/scripts/bf16_gguf.py" "$peers" "$QUANT" "$model" "$bf16" >"$work/converter.log" 2>&1 ||
  { echo "convert_hf_to_gguf.py failed, see $work/converter.log" >&2; exit 1; }

# Seconds of one run.
seconds() {
  local start=$EPOCHREALTIME
  "$@" >"$work/run.log" 2>&1 || { cat "$work/run.log" >&2; exit 1; }
  local end=$EPOCHREALTIME
  echo "$start $end" | awk '{ printf "%.4f\n", $2 - $1 }'
}

# Runs ours and theirs in turns; prints medians and the ratio of the medians.
compare() {
  local label=$1 ours=$2 theirs=$3
  : >"$work/ours" && : >"$work/theirs"
  for _ in $(seq 0 "$runs"); do
    seconds $ours >>"$work/ours"
    seconds $theirs >>"$work/theirs"
  done
  # The first run of each warms the page cache.
  local a b
  a=$(tail -n +2 "$work/ours" | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }')
  b=$(tail -n +2 "$work/theirs" | sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }')
  echo "$label $a $b" | awk -F' ' '{ printf "| %s | %.2f s | %.2f s | %.1f× |\n", $1, $2, $3, $3 / $2 }'
}

echo "$name, $runs runs in turns, medians of whole processes"
echo
echo "| | quant | llama.cpp | faster by |"
echo "|---|---|---|---|"
for format in q4_k_m q8_0; do
  compare "$format,1_thread" \
    "$QUANT convert $model --format $format --method rtn --no-validate --quiet --force --threads 1 -o $work/ours.gguf" \
    "$peers/bin/llama-quantize $bf16 $work/theirs.gguf $format 1"
done
compare "perplexity_bf16,${threads}_threads" \
  "$QUANT eval $model --ppl --device cpu --text $text --windows $windows --threads $threads --quiet" \
  "$peers/bin/llama-perplexity -m $bf16 -f $text -c 512 -b 512 --no-escape --chunks $windows -t $threads"

# Ours alone: bytes of BF16 weights per second and core.
echo
size=$(du -cbL "$model"/*.safetensors | tail -1 | cut -f1)
for format in mxfp4 int8 q8_0; do
  rm -f "$work/alone"
  for _ in $(seq "$runs"); do
    seconds "$QUANT" convert "$model" --format $format --method rtn --no-validate --quiet --force --threads 1 -o "$work/alone-$format" >>"$work/alone"
  done
  sort -n "$work/alone" | awk -v size="$size" -v format=$format \
    '{ v[NR] = $1 } END { t = v[int((NR + 1) / 2)]; printf "%s, 1 thread: %.2f s, %.2f GB/s of weights read\n", format, t, size / t / 1e9 }'
done
