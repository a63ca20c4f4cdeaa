"""Writes tests/golden/rope.json: what transformers makes of the keys of rotary embedding.

    python scripts/golden_rope.py [OUT]

Needs torch and transformers; the versions used are recorded. Each case is a part of a config.json, from which the class makes
its configuration and its rotary module; recorded are the module's inverse frequencies and its factor of cosines and sines
after sequences of some lengths. `rotations` are vectors before and after `apply_rotary_pos_emb`.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [1.0 + i * 4 for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}


def new(theta=10000.0, **more):
    return {"rope_parameters": {"rope_theta": theta, **more}}


# name: (class, keys, lengths)
CASES = {
    "nothing": ("llama", {}, [8]),
    "theta beside": ("qwen2", {"rope_theta": 500000.0}, [8]),
    "theta inside": ("llama", new(1e6, rope_type="default"), [8]),
    "both thetas": ("llama", {"rope_theta": 7.0, **new(1e6, rope_type="default")}, [8]),
    "linear": ("llama", new(rope_type="linear", factor=4.0), [8]),
    "linear of old": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.5}}, [8]),
    "linear beside parameters": ("qwen3", {"rope_scaling": {"type": "linear", "factor": 4.0}, **new(1e5, rope_type="default")},
                                 [8]),
    "empty scaling beside parameters": ("llama", {"rope_scaling": {}, **new(1e5, rope_type="linear", factor=2.0)}, [8]),
    "both names of the type": ("llama", new(rope_type="linear", type="default", factor=2.0), [8]),
    "dynamic": ("llama", new(rope_type="dynamic", factor=2.0), [8, 1024, 1025, 3000]),
    "dynamic of old": ("qwen2", {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, [1024, 1500]),
    "llama3": ("llama", new(500000.0, **LLAMA3), [8]),
    "llama3 without its context": ("llama", new(**{k: v for k, v in LLAMA3.items() if not k.startswith("orig")}), [8]),
    "yarn": ("llama", new(**YARN), [8, 1024]),
    "yarn of old": ("qwen2", {"rope_theta": 1e6, "rope_scaling": OLD_YARN}, [8]),
    "yarn without its context": ("qwen3", {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, [8]),
    "yarn, context beside": ("llama", {"original_max_position_embeddings": 64, **new(**YARN)}, [8]),
    "yarn without a factor": ("llama", new(**{**YARN, "factor": None}), [8]),
    "yarn with betas": ("llama", new(1e5, **YARN, beta_fast=16, beta_slow=2.5), [8]),
    "yarn of fractions": ("llama", new(150000.0, **{**YARN, "factor": 32.0}, truncate=False), [8]),
    "yarn of a short ramp": ("llama", new(**YARN, beta_fast=1, beta_slow=1), [8]),
    "yarn, attention factor": ("llama", new(**YARN, attention_factor=1.25), [8]),
    "yarn, mscale": ("llama", new(**{**YARN, "factor": 40}, mscale=0.707, mscale_all_dim=0.9), [8]),
    "yarn, one mscale": ("llama", new(**YARN, mscale=0.707), [8]),
    "longrope": ("llama", new(**LONGROPE, original_max_position_embeddings=256), [256, 257, 9]),
    "longrope, factor": ("llama", new(**LONGROPE, original_max_position_embeddings=256, factor=2.0), [8]),
    "longrope, attention factor": ("llama", new(**LONGROPE, attention_factor=1.5), [8, 1024]),
    "phi3": ("phi3", {"rope_theta": 1e4, "rope_scaling": None}, [8]),
    "phi3 in part": ("phi3", {"rope_theta": 1e4, "partial_rotary_factor": 0.75}, [8]),
    "phi3 longrope": ("phi3", {"rope_theta": 1e4, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.75,
                               "rope_scaling": {"type": "longrope", "short_factor": SHORT[:6], "long_factor": LONG[:6]}},
                      [128, 129]),
    "phi3 su": ("phi3", {"original_max_position_embeddings": 128,
                         "rope_scaling": {"type": "su", "original_max_position_embeddings": 64, "short_factor": SHORT,
                                          "long_factor": LONG}}, [128, 129]),
    "phi3 yarn": ("phi3", {"original_max_position_embeddings": 128,
                           "rope_scaling": {"type": "yarn", "short_factor": SHORT, "long_factor": LONG}}, [128, 129]),
    "phi3 without its context": ("phi3", {"max_position_embeddings": 8192, **new(
        rope_type="longrope", short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=77)}, [77, 78]),
    "proportional": ("llama", new(1e6, rope_type="proportional", partial_rotary_factor=0.25), [8]),
    "proportional, factor": ("llama", new(1e6, rope_type="proportional", partial_rotary_factor=0.3, factor=8.0), [8]),
}
SIZES = dict(hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=1024, intermediate_size=64,
             num_hidden_layers=1, vocab_size=32, num_key_value_heads=4, pad_token_id=0)
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}


def of(kind):
    stem = CLASSES[kind]
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return getattr(transformers, f"{stem}Config"), getattr(module, f"{stem}RotaryEmbedding")


def case(name, kind, keys, lengths):
    config_class, rotary = of(kind)
    module = rotary(config_class.from_dict(json.loads(json.dumps({**SIZES, **keys}))))
    angles = []
    for tokens in lengths:
        module(torch.zeros(1), torch.arange(tokens)[None])
        angles.append({"tokens": tokens, "inverse_frequencies": module.inv_freq.tolist()})
    return {"name": name, "class": kind, "config": {"max_position_embeddings": 1024, **keys}, "head_dim": SIZES["head_dim"],
            "magnitude": float(module.attention_scaling), "angles": angles}


def rotation(kind, head_dim, rotary_dim):
    """Rotates some vectors as a class does, by angles i + 1 per position."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    x = torch.randn((1, 1, 3, head_dim), generator=torch.Generator().manual_seed(head_dim))
    angles = torch.arange(1, rotary_dim // 2 + 1).float() / 4
    turned = torch.arange(3).float()[None, :, None] * torch.cat((angles, angles))
    y, _ = module.apply_rotary_pos_emb(x, x, turned.cos(), turned.sin())
    return {"class": kind, "head_dim": head_dim, "inverse_frequencies": angles.tolist(), "x": x.flatten().tolist(),
            "y": y.flatten().tolist()}


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests/golden/rope.json")
    golden = {
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "cases": [case(name, *row) for name, row in CASES.items()],
        "rotations": [rotation("llama", 8, 8), rotation("phi3", 12, 8), rotation("glm4", 8, 8), rotation("glm4", 12, 8)],
    }
    out.write_text(json.dumps(golden).replace('{"name"', '\n{"name"').replace('{"class"', '\n{"class"') + "\n")
    print(f"{out}: {out.stat().st_size} bytes")


main()
