#!/usr/bin/env bash
# Prints the README's results table: every format of every model, converted, loaded back and measured.
#
# usage: scripts/results.sh WORK_DIR [MODEL_DIR...]      default model: the embedded one
#        METHOD=rtn  FORMATS=mxfp4,int8,…  TEXT=FILE  CALIB=FILE  WINDOWS=60  QUANT=program to use, built if not given
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- "$repository/eval/tiny-llama"
formats=${FORMATS:-mxfp4,int8,int8-w8a8,q8_0,q6_k,q5_k_m,q5_k_s,q4_k_m,q4_k_s,q4_0}
text=${TEXT:-$repository/eval/eval.txt}
if [ -z "${QUANT:-}" ]; then
  cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
  QUANT=${CARGO_TARGET_DIR:-$repository/target}/release/quant
fi

options=(--method "${METHOD:-rtn}" --force --no-validate --quiet)
[ -z "${CALIB:-}" ] || options+=(--calib "$CALIB")

echo "| model | format | bytes | bits/weight | PPL | ΔPPL ± SE | KLD ± SE | same top-1 % |"
echo "|---|---|---|---|---|---|---|---|"
for model in "$@"; do
  name=$(basename "$model")
  artifacts=()
  for format in ${formats//,/ }; do
    case $format in q*) outs=("$format.gguf") ;; mxfp4) outs=(mxfp4 mxfp4.gguf) ;; *) outs=("$format") ;; esac
    for out in "${outs[@]}"; do
      case $out in *.gguf) dialect=gguf ;; *) dialect=compressed-tensors ;; esac
      "$QUANT" convert "$model" --format "$format" --dialect $dialect --out "$work/$name-$out" "${options[@]}" >&2
      artifacts+=("$work/$name-$out")
    done
  done
  "$QUANT" eval "${artifacts[@]}" --baseline "$model" --ppl --kld --text "$text" --windows "${WINDOWS:-60}" --csv - --quiet |
    awk -F, 'NR > 1 {
      kld = $8 == "" ? "–" : sprintf("%.5f ± %.5f", $8, $9)
      delta = $6 == "" ? "–" : sprintf("%+.4f ± %.4f", $6, $7)
      top = $11 == "" ? "–" : sprintf("%.2f", 100 * $11)
      printf "| %s | %s | %d | %.3f | %.4f | %s | %s | %s |\n", $1, $2, $3, $4, $5, delta, kld, top
    }'
done
