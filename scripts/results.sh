#!/usr/bin/env bash
# Prints the README's results table: method × format × model, each artifact converted, loaded back and measured.
#
# usage: scripts/results.sh WORK_DIR [MODEL_DIR...]      default model: the embedded one
#        METHODS="rtn gptq"  FORMATS=mxfp4,int8,…  EFFORT=balanced  DEVICE=auto  TEXT=FILE  CALIB=NAME|FILE  WINDOWS=60
#        QUANT=program to use, built if not given
# Seconds are those of the conversion alone, without measuring. Artifacts that exist in WORK_DIR are measured, not made again.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7p' "$0" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- "$repository/eval/tiny-llama"
formats=${FORMATS:-mxfp4,nvfp4,fp8,int4,int8,int8-w8a8,q8_0,q6_k,q5_k_m,q4_k_m,q4_0}
text=${TEXT:-$repository/eval/eval.txt}
if [ -z "${QUANT:-}" ]; then
  cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
  QUANT=${CARGO_TARGET_DIR:-$repository/target}/release/quant
fi

options=(--force --no-validate --quiet --effort "${EFFORT:-balanced}" --calib "${CALIB:-default}"
  --device "${DEVICE:-auto}")
touch "$work/seconds"

echo "| model | method | format | bytes | PPL | ΔPPL ± SE | KLD ± SE | same top-1 % | seconds |"
echo "|---|---|---|---|---|---|---|---|---|"
for model in "$@"; do
  name=$(basename "$model")
  artifacts=()
  for format in ${formats//,/ }; do
    case $format in q*) outs=("$format.gguf") ;; mxfp4) outs=(mxfp4 mxfp4.gguf) ;; *) outs=("$format") ;; esac
    for out in "${outs[@]}"; do
      case $out in *.gguf) dialect=gguf ;; *) dialect=compressed-tensors ;; esac
      for method in ${METHODS:-rtn gptq}; do
        artifact=$name.$method.$out
        artifacts+=("$work/$artifact")
        [ ! -e "$work/$artifact" ] || continue
        start=$(date +%s)
        "$QUANT" convert "$model" --format "$format" --dialect $dialect --method "$method" --out "$work/$artifact" \
          "${options[@]}" >&2
        echo "$artifact,$(($(date +%s) - start))" >>"$work/seconds"
      done
    done
  done
  "$QUANT" eval "${artifacts[@]}" --baseline "$model" --ppl --kld --text "$text" --windows "${WINDOWS:-60}" --device "${DEVICE:-auto}" \
    --csv - --quiet |
    awk -F, 'FILENAME != "-" { seconds[$1] = $2; next }
      FNR == 1 { next }
      {
        method = split($1, part, ".") > 1 ? part[2] : "–"
        kld = $8 == "" ? "–" : sprintf("%.5f ± %.5f", $8, $9)
        delta = $6 == "" ? "–" : sprintf("%+.4f ± %.4f", $6, $7)
        top = $11 == "" ? "–" : sprintf("%.2f", 100 * $11)
        took = $1 in seconds ? seconds[$1] : "–"
        printf "| %s | %s | %s | %d | %.4f | %s | %s | %s | %s |\n", part[1], method, $2, $3, $5, delta, kld, top, took
      }' "$work/seconds" -
done
