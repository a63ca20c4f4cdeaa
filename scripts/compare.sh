#!/usr/bin/env bash
# Prints by how much files of other tools diverge from the original beside ours, KLD and same-top-1 by `quant eval`:
# llama-quantize without and with llama-imatrix, llm-compressor (nearest codes for INT8, GPTQ for MXFP4), ours with nearest
# and with calibrated codes. One calibration text for all.
#
# usage: scripts/compare.sh WORK_DIR MODEL_DIR    needs scripts/peers.sh WORK_DIR/peers (or PEERS=DIR)
#        FORMATS=q4_k_m,…  CALIB=FILE  TEXT=FILE  WINDOWS=60  EFFORT=balanced  DEVICE=auto
#        LLM_COMPRESSOR=a Python with llmcompressor 0.14; its rows are left out without one
#        BF16=the model as a BF16 GGUF file, converted by llama.cpp if not given;  QUANT=program, built if not given
set -euo pipefail
[ $# = 2 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
model=$(cd "$2" && pwd)
peers=${PEERS:-$work/peers}
calib=${CALIB:-$repository/calib-data/general.txt}
if [ -z "${QUANT:-}" ]; then
  cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
  QUANT=${CARGO_TARGET_DIR:-$repository/target}/release/quant
fi
name=$(basename "$model")
out=$work/compare/$name
mkdir -p "$out"
bf16=${BF16:-$out/bf16.gguf}
[ -f "$bf16" ] || "$peers/venv/bin/python" "$repository/scripts/bf16_gguf.py" "$peers" "$QUANT" "$model" "$bf16" >&2

# Files are named FORMAT.TOOL, for the table below.
make_once() {
  [ -e "$1" ] || "${@:2}" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
}
imatrix=$out/imatrix.gguf
make_once "$imatrix" "$peers/bin/llama-imatrix" -m "$bf16" -f "$calib" -o "$imatrix" -c 512 -b 512 --no-ppl
ours=("$QUANT" convert "$model" --calib "$calib" --effort "${EFFORT:-balanced}" --device "${DEVICE:-auto}" --no-validate --quiet)
artifacts=()
for format in $(tr , ' ' <<<"${FORMATS:-q4_k_m,q5_k_m,q6_k,q8_0,mxfp4,int8}"); do
  case $format in
    q*)
      end=.gguf
      make_once "$out/$format.llama-quantize.gguf" "$peers/bin/llama-quantize" "$bf16" "$out/$format.llama-quantize.gguf" "$format"
      make_once "$out/$format.llama-quantize+imatrix.gguf" "$peers/bin/llama-quantize" --imatrix "$imatrix" "$bf16" \
        "$out/$format.llama-quantize+imatrix.gguf" "$format"
      ;;
    *)
      end=
      [ -z "${LLM_COMPRESSOR:-}" ] || make_once "$out/$format.llm-compressor" \
        "$LLM_COMPRESSOR" "$repository/scripts/llm_compressor.py" "$model" "$format" "$calib" "$out/$format.llm-compressor"
      ;;
  esac
  for method in rtn gptq; do
    make_once "$out/$format.quant-$method$end" "${ours[@]}" --format "$format" --method $method -o "$out/$format.quant-$method$end"
  done
  for file in "$out/$format".*; do artifacts+=("$file"); done
done
"$QUANT" eval "${artifacts[@]}" --baseline "$model" --ppl --kld --text "${TEXT:-$repository/eval/eval.txt}" \
  --windows "${WINDOWS:-60}" --device "${DEVICE:-auto}" --csv - --quiet |
  awk -F, -v name="$name" '
    BEGIN {
      count = split("llama-quantize llama-quantize+imatrix llm-compressor quant-rtn quant-gptq", tools, " ")
      print "| model | format | bytes | llama-quantize | with llama-imatrix | llm-compressor | quant, nearest | quant, calibrated |"
      print "|---|---|---|---|---|---|---|---|"
    }
    FNR > 2 {
      sub(/\.gguf$/, "", $1)
      format = substr($1, 1, index($1, ".") - 1)
      tool = substr($1, index($1, ".") + 1)
      if (!(format in bytes)) { order[++formats] = format; bytes[format] = $3 }
      if (bytes[format] != $3) different = " (" $3 " bytes)"; else different = ""
      cell[format, tool] = sprintf("%.5f, %.2f %%%s", $8, 100 * $11, different)
    }
    END {
      for (i = 1; i <= formats; i++) {
        line = "| " name " | " order[i] " | " bytes[order[i]]
        for (j = 1; j <= count; j++) line = line " | " ((order[i], tools[j]) in cell ? cell[order[i], tools[j]] : "–")
        print line " |"
      }
    }'
