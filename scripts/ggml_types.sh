#!/usr/bin/env bash
# Prints one table over ggml's block types. Of llama-quantize's files: perplexity here and in llama.cpp on the same windows.
# Of the formats written here: the same, and the divergence from the original beside llama-quantize's with an importance
# matrix (nearest codes: no more; calibrated: at most 75 % of it; at the same bytes).
#
# usage: scripts/ggml_types.sh WORK_DIR MODEL_DIR    needs scripts/peers.sh WORK_DIR/peers (or PEERS=DIR)
#        BF16=the model as a BF16 GGUF file, converted by llama.cpp if not given;  QUANT=program, built if not given
#        TYPES="Q2_K …"  OURS="q3_k_m …"  CALIB=FILE  TEXT=FILE  WINDOWS=60  DEVICE=auto, for calibration
set -euo pipefail
[ $# = 2 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
model=$(cd "$2" && pwd)
peers=${PEERS:-$work/peers}
calib=${CALIB:-$repository/calib-data/general.txt}
text=${TEXT:-$repository/eval/eval.txt}
windows=${WINDOWS:-60}
types=${TYPES:-Q2_K Q3_K_S Q3_K_M Q3_K_L IQ4_NL IQ4_XS IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S TQ1_0 TQ2_0}
ours=${OURS:-q3_k_m q3_k_s q2_k iq4_nl iq4_xs}
if [ -z "${QUANT:-}" ]; then
  cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
  QUANT=${CARGO_TARGET_DIR:-$repository/target}/release/quant
fi
out=$work/ggml_types/$(basename "$model")
mkdir -p "$out"
bf16=${BF16:-$out/bf16.gguf}
[ -f "$bf16" ] || "$peers/venv/bin/python" "$repository/scripts/bf16_gguf.py" "$peers" "$QUANT" "$model" "$bf16" >&2

make_once() {
  [ -e "$1" ] || "${@:2}" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
}
# Prints perplexity, divergence and bytes of files, one line each, `-` where a file has none.
measured() {
  "$QUANT" eval "$@" --baseline "$model" --ppl --kld --text "$text" --windows "$windows" --device cpu --csv - --quiet |
    awk -F, 'FNR > 2 { print $5, $8, $3 }'
}
in_llama_cpp() {
  "$peers/bin/llama-perplexity" -m "$1" -f "$text" -c 512 -b 512 --no-escape --chunks "$windows" 2>&1 | sed -n 's/.*Final estimate: PPL = \([0-9.]*\).*/\1/p'
}
row() { # NAME FILE [FILE with which to compare divergences]
  local ppl kld bytes theirs line against other size
  read -r ppl kld bytes < <(measured "$2")
  theirs=$(in_llama_cpp "$2")
  line=$(awk -v a="$ppl" -v b="$theirs" 'BEGIN { printf "%.4f | %.4f | %+.2f %%", a, b, 100 * (a / b - 1) }')
  kld=$(printf %.5f "$kld")
  against=–
  if [ -n "${3:-}" ]; then
    read -r _ other size < <(measured "$3")
    against=$(awk -v a="$kld" -v b="$other" 'BEGIN { printf "%.1f %%", 100 * a / b }')
    [ "$size" = "$bytes" ] || against="$against ($size bytes)"
  fi
  echo "| $1 | $bytes | $line | $kld | $against |"
}

imatrix=$out/imatrix.gguf
make_once "$imatrix" "$peers/bin/llama-imatrix" -m "$bf16" -f "$calib" -o "$imatrix" -c 512 -b 512 --no-ppl
echo "| file | bytes | PPL | in llama.cpp | difference | KLD | of llama-quantize's with an importance matrix |"
echo "|---|---|---|---|---|---|---|"
for type in $types; do
  file=$out/$type.llama-quantize+imatrix.gguf
  make_once "$file" "$peers/bin/llama-quantize" --imatrix "$imatrix" "$bf16" "$file" "$type"
  row "$type, llama-quantize" "$file"
done
for format in $ours; do
  theirs=$out/${format^^}.llama-quantize+imatrix.gguf
  make_once "$theirs" "$peers/bin/llama-quantize" --imatrix "$imatrix" "$bf16" "$theirs" "${format^^}"
  for method in rtn fast balanced; do
    file=$out/$format.quant-$method.gguf
    how=(--method gptq --effort "$method")
    [ "$method" != rtn ] || how=(--method rtn)
    make_once "$file" "$QUANT" convert "$model" --format "$format" "${how[@]}" --calib "$calib" --device "${DEVICE:-auto}" \
      --no-validate --quiet -o "$file"
    row "$format, $method" "$file" "$theirs"
  done
done
