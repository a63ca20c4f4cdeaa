#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command: kernels compile, each operation agrees with the CPU, whole models
# give the same answer, speed. Writes a table to the file named first; with --sanitize also runs compute-sanitizer.
#
#   scripts/gpu.sh TABLE.md [--sanitize]
#
# QUANT_TEST_MODELS   model folders, `:` between them, for the whole-model part (default: none, part left out)
# QUANT_TEST_TEXT     text for them
# QUANT_TEST_CALIBRATION  a text of at least 262,144 tokens: times the calibration of an 8B shape on it (default: none, part
#                     left out); needs torch, and 22 GB in QUANT_TEST_SCRATCH (default: /dev/shm)
# QUANT_TEST_BINARIES a folder with the test executables `parity`, `gradients`, `generation`, `solver`, `same_answer`, `speed` and `quant`, for machines
#                     without cargo; built here otherwise
set -uo pipefail
cd "$(dirname "$0")/.."
table=${1:?usage: scripts/gpu.sh TABLE.md [--sanitize]}
sanitize=${2:-}
export QUANT_REQUIRE_GPU=1
failed=0

# Prints the path of a test executable.
binary() {
    if [ -n "${QUANT_TEST_BINARIES:-}" ]; then
        echo "$QUANT_TEST_BINARIES/$1"
    else
        cargo test --release --locked --no-run --test "$1" --message-format=json 2>/dev/null |
            sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1
    fi
}

# Runs one test of an executable under racecheck and prints its verdict.
racecheck() {
    local said
    said=$(compute-sanitizer --tool racecheck --error-exitcode 9 "$1" --exact "$2" 2>&1) || failed=1
    echo "$2: $(tail -1 <<<"$said")"
}

gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)
{
    echo "# GPU tests and speed"
    echo
    echo "$gpu, $(date -u +%F)"
    echo
    echo "## Each operation against the CPU"
    echo
    echo '```'
} >"$table"
"$(binary parity)" >>"$table" 2>&1 || failed=1
"$(binary gradients)" >>"$table" 2>&1 || failed=1
"$(binary generation)" >>"$table" 2>&1 || failed=1
"$(binary solver)" --nocapture --test-threads=1 >>"$table" 2>&1 || failed=1
echo '```' >>"$table"

if [ -n "${QUANT_TEST_MODELS:-}" ]; then
    {
        echo
        echo "## Whole models: KL(CPU ‖ GPU), same most likely token, perplexity on the CPU, difference on the GPU"
        echo
    } >>"$table"
    "$(binary same_answer)" --ignored --nocapture >>"$table" 2>&1 || failed=1
fi

if [ -n "${QUANT_TEST_CALIBRATION:-}" ]; then
    scratch=$(mktemp -d "${QUANT_TEST_SCRATCH:-/dev/shm}/quant.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    quant=${QUANT_TEST_BINARIES:+$QUANT_TEST_BINARIES/quant}
    [ -n "$quant" ] || { cargo build --release --locked --quiet && quant=target/release/quant; }
    python3 scripts/random_llama.py "$scratch/8b" eval/tiny-llama
    {
        echo
        echo "## Calibration: 8B shape to MXFP4, 128 x 2048 tokens, whole processes"
        echo
        echo "| effort | seconds |"
        echo "|---|---|"
    } >>"$table"
    for effort in fast balanced; do
        start=$(date +%s%N)
        "$quant" convert "$scratch/8b" --format mxfp4 --method gptq --effort $effort --device cuda:0 --calib "$QUANT_TEST_CALIBRATION" \
            --calib-tokens 262144 --calib-ctx 2048 --no-validate -o "$scratch/$effort" >&2 || failed=1
        echo "| $effort | $((($(date +%s%N) - start) / 1000000000)) |" >>"$table"
        rm -rf "${scratch:?}/$effort"
    done
fi

{
    echo
    echo "## Rates"
    echo
    echo "| what | rate | share of copy or product |"
    echo "|---|---|---|"
} >>"$table"
"$(binary speed)" --ignored --nocapture --test-threads=1 2>&1 | sed -n 's/^[^|]*|/|/p' >>"$table" || failed=1

if [ "$sanitize" = --sanitize ]; then
    {
        echo
        echo "## compute-sanitizer memcheck"
        echo
        echo '```'
        for tests in parity gradients generation; do
            compute-sanitizer --tool memcheck --kernel-regex-exclude kns=nvjet --error-exitcode 9 "$(binary $tests)" --test-threads=1 2>&1 |
                tail -8 || failed=1
        done
        echo '```'
        echo
        echo "## compute-sanitizer racecheck"
        echo
        echo '```'
        # Racecheck fails by itself in NVIDIA's matrix kernels, so tests that call those are left out, and each of the others
        # has a process of its own.
        parity=$(binary parity)
        for name in $("$parity" --list | sed -n 's/: test$//p' | grep -vE 'linear|moments|compare|score|lowest_id'); do
            racecheck "$parity" "$name"
        done
        for name in rms_norm_gradient rows_are_measured_and_scaled swiglu_gradient; do
            racecheck "$(binary gradients)" "$name"
        done
        racecheck "$(binary generation)" quantized_inputs_are_quantized_in_every_step
        echo '```'
    } >>"$table"
fi
cat "$table"
exit $failed
