"""Writes tests/golden/logits: NAME/ holds a tiny random checkpoint, NAME.safetensors token ids and transformers' logits.

    python scripts/logit_reference.py [OUT]

Needs torch, transformers and safetensors. Weights are BF16 values drawn from a fixed seed, wide enough that every part of
the forward pass moves the logits; references are computed in F32 with eager attention. The versions used are recorded in
versions.json. Same versions, same bytes.
"""

import json
import shutil
import sys
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

TOKENS = 24
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None)


def rope(kind="default", theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = rope("llama3", 10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)

YARN = rope("yarn", 1e6, factor=2.0, original_max_position_embeddings=8, beta_fast=16, truncate=False)


def longrope(original):
    """24 tokens are long or short."""
    return rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.5, 2.0, 4.0, 8.0],
                original_max_position_embeddings=original)


# name: (configuration, the key of the type if config.json is rewritten in the spelling of transformers 4)
MODELS = {
    "llama2": (LlamaConfig(**SIZES, num_key_value_heads=4, **rope()), "rope_type"),
    "llama3": (LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **LLAMA3), None),
    "llama3_old": (LlamaConfig(**SIZES, num_key_value_heads=1, **LLAMA3), "rope_type"),
    "llama_biases": (LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
                                 **rope("linear", factor=4.0)), None),
    "mistral": (MistralConfig(**SIZES, num_key_value_heads=2, head_dim=12, sliding_window=5, **rope()), None),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, **rope(theta=1e6)), None),
    "qwen3": (Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, **rope(theta=1e6)), None),
    "qwen2_yarn_old": (Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, **YARN), "type"),
    "qwen3_dynamic_old": (Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, **rope("dynamic", 1e6, factor=4.0)), "type"),
    "llama_longrope": (LlamaConfig(**SIZES, num_key_value_heads=2, **longrope(16)), None),
    "llama_longrope_short": (LlamaConfig(**SIZES, num_key_value_heads=2, **longrope(64)), None),
}


def random_weights(model, seed):
    """Matrices with rows of length about 1.5, gains around 1, biases around 0; all exact in BF16."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            value = noise * (1.0 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5)
        else:
            value = 0.3 * noise + (0.0 if name.endswith("bias") else 1.0)
        parameter.data = value.to(torch.bfloat16).float()


def old_spelling(config, key):
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    parameters[key] = parameters.pop("rope_type")
    config["rope_scaling"] = None if parameters[key] == "default" else parameters
    config["torch_dtype"] = config.pop("dtype", "bfloat16")


def write(folder, config, old, seed):
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    random_weights(model, seed)
    model.tie_weights()
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(ids).logits[0]
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if old:
        path = folder / "config.json"
        spelled = json.loads(path.read_text())
        old_spelling(spelled, old)
        path.write_text(json.dumps(spelled, indent=2) + "\n")
    save_file({"ids": ids[0].int(), "logits": logits.contiguous()}, folder.with_suffix(".safetensors"))
    print(f"{folder.name}: logits {logits.min():.2f} .. {logits.max():.2f}")


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests/golden/logits")
    out.mkdir(parents=True, exist_ok=True)
    for seed, (name, (config, old)) in enumerate(MODELS.items()):
        write(out / name, config, old, seed)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, safetensors)}
    (out / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
