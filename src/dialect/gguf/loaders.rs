//! Who loads GGUF files. Facts were read in the source of the versions in [`LOADERS`](crate::loaders::LOADERS) or found
//! by running them.

use crate::loaders::Loads::{If, No, Unchecked, Yes};
use crate::loaders::*;

/// See [`Row`].
pub(super) const ROWS: &[Row] = &[
    ("vLLM", always, Unchecked, "its GGUF loader was not checked; use a compressed-tensors format"),
    ("SGLang", always, Unchecked, "its GGUF loader was not checked; use a compressed-tensors format"),
    ("transformers", always, Unchecked, "its GGUF loader was not checked; use a compressed-tensors format"),
    ("llama.cpp", has_mxfp4, If, "builds since August 2025, which know the MXFP4 type"),
    ("llama.cpp", always, Yes, "`llama-cli -m FILE`"),
    ("Ollama", has_mxfp4, If, "a version whose llama.cpp knows the MXFP4 type; `FROM ./FILE` in a Modelfile"),
    ("Ollama", always, Yes, "`FROM ./FILE` in a Modelfile, then `ollama create NAME -f Modelfile`"),
    ("LM Studio", has_mxfp4, If, "an engine whose llama.cpp knows the MXFP4 type; `lms import FILE`"),
    ("LM Studio", always, Yes, "`lms import FILE`"),
    ("MLX", always, No, "mlx-lm loads folders of safetensors in its own layout"),
];
