#!/usr/bin/env python3
"""Peak memory of a conversion: writes a synthetic sharded BF16 checkpoint of 4 GB and more, converts it to several
formats and prints the peak resident size of each run, then that of an evaluation in 600 MB. Exit 1 if one passes 300 MB +
3 × the largest tensor, or the evaluation its limit.

usage: scripts/memory.py QUANT WORK_DIR        needs numpy; 8 GB of disk
"""
import json
import multiprocessing
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import numpy as np

HIDDEN, FFN, LAYERS, VOCAB, HEADS, KV = 2048, 8192, 32, 32000, 16, 4
FORMATS = ["mxfp4", "int8", "q8_0", "q4_k_m"]


def tensors():
    """Names and shapes of a Llama of 2.1 billion weights."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (HIDDEN,)
        for name, rows in [("q_proj", HIDDEN), ("k_proj", HIDDEN * KV // HEADS), ("v_proj", HIDDEN * KV // HEADS), ("o_proj", HIDDEN)]:
            yield p + f"self_attn.{name}.weight", (rows, HIDDEN)
        yield p + "post_attention_layernorm.weight", (HIDDEN,)
        yield p + "mlp.gate_proj.weight", (FFN, HIDDEN)
        yield p + "mlp.up_proj.weight", (FFN, HIDDEN)
        yield p + "mlp.down_proj.weight", (HIDDEN, FFN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_checkpoint(folder: pathlib.Path, tokenizer: pathlib.Path):
    rng = np.random.default_rng(0)
    # One block of normal BF16 weights, cut anew for every tensor: fast to make, no two rows alike.
    pool = (rng.standard_normal(1 << 24, dtype=np.float32) * 0.02).view(np.uint32)
    pool = (pool >> 16).astype(np.uint16)
    shards, used, index = [[]], 0, {}
    for name, shape in tensors():
        size = 2 * int(np.prod(shape))
        if used + size > 10**9:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += size
    for n, members in enumerate(shards):
        file = f"model-{n + 1:05}-of-{len(shards):05}.safetensors"
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in members:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            index[name] = file
            offset += size
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name, shape in members:
                count, start = int(np.prod(shape)), int(rng.integers(1 << 20))
                while count:
                    part = pool[start : start + count]
                    out.write(part.tobytes())
                    count, start = count - len(part), 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}))
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(tokenizer / name, folder / name)


def main():
    quant, work = sys.argv[1], pathlib.Path(sys.argv[2])
    model = work / "synthetic-4gb"
    if not model.exists():
        model.mkdir(parents=True)
        # In a process of its own: what this one ever held counts as the peak of those it starts.
        tokenizer = pathlib.Path(__file__).parent.parent / "eval" / "tiny-llama"
        writer = multiprocessing.Process(target=write_checkpoint, args=(model, tokenizer))
        writer.start()
        writer.join()
    total = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    largest = max(2 * int(np.prod(shape)) for _, shape in tensors())
    limit = 300e6 + 3 * largest
    print(f"{total / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} shards, largest tensor {largest / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
    failed = False
    def run(command):
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        return status, usage, usage.ru_maxrss * 1024

    for name in FORMATS:
        out = work / f"out-{name}"
        command = [quant, "convert", str(model), "--format", name, "--method", "rtn", "--no-validate", "--quiet", "--force", "--out", str(out)]
        status, usage, peak = run(command)
        seconds = usage.ru_utime + usage.ru_stime
        failed |= status != 0 or peak > limit
        print(f"{name}: peak {peak / 1e6:.0f} MB, {total / 1e9 / seconds:.2f} GB of weights per core-second")
        shutil.rmtree(out, ignore_errors=True)
    command = [quant, "eval", str(model), "--device", "cpu", "--ram", "600M", "--ctx", "256", "--windows", "2"]
    status, _, peak = run(command)
    failed |= status != 0 or peak > 600e6
    print(f"evaluation within 600 MB: peak {peak / 1e6:.0f} MB")
    sys.exit(failed)


main()
