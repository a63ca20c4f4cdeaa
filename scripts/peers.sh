#!/usr/bin/env bash
# Installs the programs our artifacts are checked in, at fixed versions: DIR/venv (Python 3.12) and DIR/bin (llama.cpp).
# usage: scripts/peers.sh DIR          PYTHON=python3.12 by default; DIR lies outside the repository
# Needs a C++ compiler. Takes about 25 minutes on two cores, nearly all of it building llama.cpp; a second run is quick.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }

llama_cpp_python=0.3.36 # bundles llama.cpp 0c1e57098
tools=(llama-quantize llama-perplexity llama-imatrix llama-tokenize)

mkdir -p "$1"
cd "$1"
[ -x venv/bin/python ] || "${PYTHON:-python3.12}" -m venv venv
pip=(venv/bin/python -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install numpy safetensors tokenizers psutil gguf==0.19.0 cmake ninja scikit-build-core
"${pip[@]}" install torch==2.13.0 transformers==5.17.0 compressed-tensors==0.17.0

if [ ! -x bin/llama-tokenize ]; then
    # Without build isolation pip does not compile CMake only to read the package's name.
    "${pip[@]}" download --no-deps --no-build-isolation --no-binary llama-cpp-python -d source "llama-cpp-python==$llama_cpp_python"
    tar -xzf "source/llama_cpp_python-$llama_cpp_python.tar.gz" -C source
    PATH="$PWD/venv/bin:$PATH"
    cmake -S "source/llama_cpp_python-$llama_cpp_python/vendor/llama.cpp" -B llama.cpp -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build llama.cpp --target "${tools[@]}"
    mkdir -p bin
    for tool in "${tools[@]}"; do ln -sf "../llama.cpp/bin/$tool" bin/; done
fi
venv/bin/python -c 'import compressed_tensors, gguf, torch, transformers; print(f"transformers {transformers.__version__}, torch {torch.__version__}, compressed-tensors {compressed_tensors.__version__}")'
bin/llama-perplexity --version 2>&1 | grep version
