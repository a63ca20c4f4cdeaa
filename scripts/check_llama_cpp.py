#!/usr/bin/env python3
"""Prints perplexities of one GGUF file here and in llama.cpp, for every kind of rotary embedding and stored layout that both
know, and whether tensors and keys are those of llama.cpp's own converter. Exit 1 past 1 %.

usage: scripts/check_llama_cpp.py QUANT PEERS WORK_DIR [--format q8_0] [--windows 8] [--only PATTERN] [--converter FILE]

Trained models are taken and their configuration is changed (their perplexity grows, the comparison stays): `tiny-llama` of
eval/, and of MODELS (a folder) those that are there. Phi-3 is tiny-llama with q, k, v and gate, up stored as one.
PEERS is what scripts/peers.sh made. Needs torch, safetensors, gguf.
"""
import argparse, json, os, re, shutil, subprocess, sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHORT = [1.0 + 0.02 * i for i in range(24)]
LONG = [1.0 + 0.2 * i for i in range(24)]


def phi3(config, tensors):
    """Stores q, k, v and gate, up of Llama as Phi-3 does."""
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None}
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        layer = name.removesuffix("self_attn.q_proj.weight")
        for fused, parts in [("self_attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
                             ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"])]:
            tensors[f"{layer}{fused}.weight"] = torch.cat([tensors.pop(f"{layer}{part}.weight") for part in parts])


def renamed(name, model_type, **keys):
    """Takes a model for one of another class, which stores the same tensors."""
    return lambda config, tensors: config.update(keys | {"architectures": [name], "model_type": model_type})


def mixtral(config, tensors):
    """Takes Qwen3-MoE for Mixtral: names of experts, no norms of q and k."""
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None,
               "num_local_experts": config.get("num_experts") or config["num_local_experts"],
               "intermediate_size": config["moe_intermediate_size"]}
    for name in list(tensors):
        tensor = tensors.pop(name)
        new = name.replace(".mlp.", ".block_sparse_moe.")
        for linear, short in [("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")]:
            new = new.replace(linear, short)
        if "_norm.weight" not in name:
            tensors[new] = tensor


def minimax(config, tensors):
    """The same for MiniMax M2: q and k normed as rows, a bias that chooses, half of each head turns."""
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith(("q_norm.weight", "k_norm.weight"))}
    mixtral(config, tensors)
    config |= {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "scoring_func": "sigmoid",
               "rotary_dim": config["head_dim"] // 2}
    config["rope_parameters"] = config["rope_parameters"] | {"partial_rotary_factor": 0.5}
    for name, tensor in norms.items():
        heads = config["num_attention_heads" if "q_norm" in name else "num_key_value_heads"]
        tensors[name] = tensor.repeat(heads)
    for layer in range(config["num_hidden_layers"]):
        bias = torch.arange(config["num_local_experts"], dtype=torch.float32) % 3 / 10
        tensors[f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"] = bias


def with_keys(**keys):
    return lambda config, tensors: config.update(keys)


def rope(kind, **keys):
    parameters = {"rope_type": kind, **keys}
    return lambda config, tensors: config.update(
        rope_parameters=parameters | {"rope_theta": config["rope_parameters"]["rope_theta"]})


def longrope(original):
    return [phi3, rope("longrope", short_factor=SHORT, long_factor=LONG, partial_rotary_factor=0.75),
            with_keys(original_max_position_embeddings=original, partial_rotary_factor=0.75)]


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
CASES = {
    "llama": ("tiny-llama", []),
    "llama, linear": ("tiny-llama", [rope("linear", factor=1.5)]),
    "llama, llama3": ("tiny-llama", [rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                          original_max_position_embeddings=256)]),
    "llama, yarn": ("tiny-llama", [YARN]),
    "llama, yarn with its own factor": ("tiny-llama", [rope(
        "yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=1.0, beta_fast=16)]),
    "phi3": ("tiny-llama", [phi3]),
    "phi3, partial": ("tiny-llama", [phi3, rope("default", partial_rotary_factor=0.75)]),
    "phi3, longrope, short": ("tiny-llama", longrope(1024)),
    "phi3, longrope, long": ("tiny-llama", longrope(256)),
    "qwen3": ("small-qwen3", []),
    "qwen3, yarn": ("small-qwen3", [YARN]),
    "seed_oss": ("tiny-llama", [renamed("SeedOssForCausalLM", "seed_oss", attention_bias=False)]),
    "smollm3": ("tiny-llama", [renamed("SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 1, 1, 0, 1, 1],
                                       use_sliding_window=False, sliding_window=None)]),
    "ernie4_5": ("tiny-llama", [renamed("Ernie4_5ForCausalLM", "ernie4_5", use_bias=False)]),
    "qwen3_moe": ("tiny-qwen3-moe", []),
    "mixtral": ("tiny-qwen3-moe", [mixtral]),
    "minimax_m2": ("tiny-qwen3-moe", [minimax]),
}


# Converts with the tokenizer of these models whatever the class expects (Phi-3: SentencePiece); it is not compared.
CONVERTER = """
import os, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from conversion.base import TextModel
from conversion.phi import Phi3MiniModel
TextModel.get_vocab_base_pre = lambda *_: "qwen2"
Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def checkpoint(source, changes, folder):
    """Writes the model with its changes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {}
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif "index" not in file.name:
            shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    for change in changes:
        change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def perplexities(quant, perplexity, file, text, windows):
    table = run(quant, "eval", file, "--ppl", "--text", text, "--windows", windows, "--device", "cpu", "--csv", "-",
                "--quiet").splitlines()
    rows = [line.split(",") for line in table]
    header = next(row for row in rows if "ppl" in row)
    ours = float(rows[rows.index(header) + 1][header.index("ppl")])
    # Its log thread may lose the last lines at exit.
    for _ in range(5):
        found = re.findall(rf"\[{windows}\]([0-9.]+),", run(
            perplexity, "-m", file, "-f", text, "-c", 512, "-b", 512, "--no-escape", "--chunks", windows))
        if found:
            return ours, float(found[0])
    return ours, float("nan")


def described(file):
    """Returns tensors (name: shape) and keys of a GGUF file, without those of tokenizer, name and number types."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()
            if not name.startswith(("GGUF.", "general.", "tokenizer.", "quant."))}
    return {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}, keys


def differences(ours, theirs):
    """Returns in words where our file is not the converter's."""
    (tensors, keys), (wanted, wanted_keys) = described(ours), described(theirs)
    words = [f"{name} {tensors.get(name)} for {wanted.get(name)}" for name in sorted(tensors | wanted)
             if tensors.get(name) != wanted.get(name)]
    words += [f"{key} {keys.get(key)} for {value}" for key, value in wanted_keys.items() if keys.get(key) != value]
    more = sorted(key.split(".", 1)[1] for key in keys.keys() - wanted_keys.keys())
    return "; ".join(words) or "same" + (f", and {', '.join(more)}" if more else "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("quant")
    parser.add_argument("peers", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--format", default="q8_0")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", default="")
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py")
    args = parser.parse_args()
    text, worst = ROOT / "eval/eval.txt", 0.0
    models = Path(os.environ.get("MODELS", ROOT / "eval"))
    print("| model | format | PPL | in llama.cpp | difference | beside its converter's |\n|---|---|---|---|---|---|")
    for name, (model, changes) in CASES.items():
        source = next((folder / model for folder in [models, ROOT / "eval"] if (folder / model).is_dir()), None)
        if not re.search(args.only, name) or source is None:
            continue
        # llama.cpp looks for Phi-3's own tokens in models that are called so.
        stem = args.work / re.sub(r"\W+", "_", name.replace("phi3", "phi"))
        checkpoint(source, changes, stem)
        file = stem.with_suffix(".gguf")
        run(args.quant, "convert", stem, "--format", args.format, "--method", "rtn", "--no-validate", "--force",
            "--quiet", "-o", file)
        ours, theirs = perplexities(args.quant, args.peers / "bin/llama-perplexity", file, text, args.windows)
        beside = "–"
        if args.converter:
            other = stem.with_suffix(".converter.gguf")
            run(sys.executable, "-c", CONVERTER, args.converter, stem, "--outtype", "f16", "--outfile", other)
            beside = differences(file, other)
        off = ours / theirs - 1
        worst = max(worst, abs(off)) if off == off else float("inf")
        print(f"| {name} | {args.format} | {ours:.4f} | {theirs:.4f} | {off:+.3%} | {beside} |", flush=True)
    sys.exit(worst > 0.01)


main()
