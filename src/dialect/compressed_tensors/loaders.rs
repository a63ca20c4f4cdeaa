//! Who loads compressed-tensors folders. Facts were read in the source of the versions in
//! [`LOADERS`](crate::loaders::LOADERS) or found by running them.

use crate::loaders::Loads::{If, No, Yes};
use crate::loaders::*;

/// See [`Row`].
pub(super) const ROWS: &[Row] = &[
    ("vLLM", fused_apart, No, FUSED_APART),
    ("vLLM", odd_group, No, "its 8-bit kernels know groups of 32, 64 and 128 columns, and whole rows"),
    (
        "vLLM",
        has_mxfp4,
        If,
        "GPU of compute capability 8.0 or later, `--dtype bfloat16` (float16 loses small scales); from 10.0 on inputs \
         are quantized to 4 bits too unless VLLM_DISABLED_KERNELS=FlashInferMxFp4LinearKernel; not on CPUs",
    ),
    (
        "vLLM",
        has_nvfp4,
        If,
        "GPU of compute capability 7.5 or later: unpacked as it multiplies (Marlin); not on CPUs",
    ),
    ("vLLM", has_fp8, If, "CPU, or GPU of compute capability 7.5 or later; below 8.9 inputs stay in 16 bits"),
    (
        "vLLM",
        has_w8a8,
        If,
        "CPU, or GPU of compute capability 7.5 to 9.0; from 10.0 on it fails unless \
         VLLM_DISABLED_KERNELS=CutlassInt8ScaledMMLinearKernel",
    ),
    ("vLLM", always, If, "GPU of compute capability 7.5 or later; not on CPUs"),
    (
        "SGLang",
        has_mxfp4,
        No,
        "it has no dense MXFP4 in compressed-tensors; use `--format int8` or int8-w8a8",
    ),
    ("SGLang", fused_apart, No, FUSED_APART),
    ("SGLang", has_fp8, If, "GPU of compute capability 8.9 or later"),
    (
        "SGLang",
        has_static,
        If,
        "GPU of compute capability 8.0 or later; it passes over the fixed scales of inputs and finds one per token",
    ),
    ("SGLang", always, If, "GPU of compute capability 8.0 or later"),
    (
        "transformers",
        always,
        Yes,
        "with compressed-tensors 0.15 or later; unpacked to BF16 on the first forward pass",
    ),
    ("llama.cpp", always, No, "it reads GGUF; use `--dialect gguf` or a GGUF format"),
    (
        "Ollama",
        always,
        No,
        "of safetensors it imports only unquantized ones; use `--dialect gguf` or a GGUF format",
    ),
    ("LM Studio", always, No, "it reads GGUF and MLX; use `--dialect gguf` or a GGUF format"),
    ("MLX", always, No, "mlx-lm renames packed weights only for three mixture-of-experts models"),
];
