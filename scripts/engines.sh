#!/usr/bin/env bash
# Converts models to every format, loads each artifact in the engine it is for, and compares perplexities with ours:
# GGUF in llama.cpp within 1 %, compressed-tensors in transformers within 0.01 % (1 % where inputs are quantized: there
# equal arithmetic still rounds apart, by more than that over few windows). Prints one table; exit 1 if an artifact fails.
#
# usage: scripts/engines.sh WORK_DIR [MODEL_DIR...]       default model: eval/tiny-llama
#        PEERS=WORK_DIR/peers  TEXT=eval/eval.txt  WINDOWS=40  QUANT=program to test, built if not given
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8p' "$0" >&2; exit 2; }

repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- "$repository/eval/tiny-llama"
text=${TEXT:-$repository/eval/eval.txt}
peers=${PEERS:-$work/peers}
python=$peers/venv/bin/python
windows=${WINDOWS:-40}

"$repository/scripts/peers.sh" "$peers"
if [ -z "${QUANT:-}" ]; then
    cargo build --release --quiet --manifest-path "$repository/Cargo.toml"
    QUANT=${CARGO_TARGET_DIR:-$repository/target}/release/quant
fi

compressed_tensors=(mxfp4 int8 int8-w8a8 int8-w8a8-static)
gguf=(q8_0 q6_k q5_k_m q5_k_s q4_k_m q4_k_s q4_0)

# Prints what llama-perplexity measures: the estimate after the last window. On a busy machine its log thread loses the
# last lines at exit: ask again.
llama_cpp() {
    local ppl
    for _ in 1 2 3 4 5; do
        ppl=$("$peers/bin/llama-perplexity" -m "$1" -f "$2" -c 512 -b 512 --no-escape --chunks "$windows" 2>&1 |
            sed -n "s/.*\[$windows\]\([0-9.]*\),.*/\1/p")
        [ -z "$ppl" ] || break
    done
    echo "${ppl:-nan}"
}

results=$work/results.tsv
: >"$results"
for model in "$@"; do
    name=$(basename "$model")
    out=$work/$name
    mkdir -p "$out"
    convert() { "$QUANT" convert "$model" --no-validate --force --quiet "$@" >&2; }
    for format in "${compressed_tensors[@]}"; do
        case $format in
            # Its input scales come from calibration.
            *-static) convert --effort fast --calib-tokens 16384 --format "$format" -o "$out/$format" ;;
            *) convert --method rtn --format "$format" -o "$out/$format" ;;
        esac
    done
    for format in "${gguf[@]}"; do convert --method rtn --format "$format" -o "$out/$format.gguf"; done
    convert --method rtn --format mxfp4 --dialect gguf -o "$out/mxfp4.gguf"

    # Equal token ids are a condition of equal perplexity; see text.py.
    "$python" "$repository/scripts/engines/text.py" "$text" "$model/tokenizer.json" "$peers/bin/llama-tokenize" \
        "$out/q8_0.gguf" $((windows * 512)) "$out/text.txt"
    "$QUANT" eval "${compressed_tensors[@]/#/$out/}" "$out"/*.gguf --ppl --text "$out/text.txt" --ctx 512 \
        --windows "$windows" --json "$out/eval.json" --quiet >/dev/null

    for format in "${compressed_tensors[@]}"; do
        limit=0.0001
        [[ "$format" != int8-w8a8* ]] || limit=0.01
        ppl=$("$python" "$repository/scripts/engines/transformers_ppl.py" "$out/$format" "$out/text.txt" "$out/eval.json") || ppl=nan
        printf '%s\t%s\t%s\t%s\t%s\n' "$out/eval.json" "$out/$format" transformers "$ppl" "$limit" >>"$results"
    done
    for artifact in "$out"/*.gguf; do
        ppl=$(llama_cpp "$artifact" "$out/text.txt") || ppl=nan
        printf '%s\t%s\t%s\t%s\t%s\n' "$out/eval.json" "$artifact" llama.cpp "$ppl" 0.01 >>"$results"
    done
done
"$python" "$repository/scripts/engines/compare.py" "$results"
