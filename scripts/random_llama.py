"""Writes a random BF16 checkpoint of Llama-3-8B's shape, for speed measurements: random_llama.py OUT TOKENIZER_FOLDER

The tokenizer is copied from any model with at most 128,256 tokens. Needs torch and safetensors.
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 4096, 14336, 32, 8, 128, 128256


def main(out: pathlib.Path, tokenizer: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, device=device) * cols**-0.5).to(torch.bfloat16).cpu()

    def layer(i: int) -> dict[str, torch.Tensor]:
        name = f"model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }
        tensors = {f"{name}{module}.weight": matrix(*shape) for module, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        return tensors

    shards = [
        {
            "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        },
        {"lm_head.weight": matrix(VOCAB, HIDDEN)},
    ]
    index = {}
    count = len(shards) + LAYERS // 8
    for i in range(count):
        tensors = shards[i] if i < len(shards) else {}
        if i >= len(shards):
            for at in range(8 * (i - len(shards)), 8 * (i - len(shards)) + 8):
                tensors |= layer(at)
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": json.loads((tokenizer / "config.json").read_text()).get("bos_token_id"),
    }
    (out / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, out / file)


main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
