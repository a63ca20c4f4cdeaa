"""Proves that transformers reads what `quant convert --format f32|bf16` writes as the model that it was made from.

    python scripts/dense_crosscheck.py QUANT TEXT SOURCE... [--windows N] [--format f32]

Each SOURCE (a GGUF file, a folder) is written as an ordinary folder. Needs torch and transformers. Printed for each: the
tokens that transformers' tokenizer of the folder and `quant` make of the text, and the perplexity of both in F32 (windows of
512, second half scored). Exit status 1 if tokens differ in number or perplexities by more than 1e-4 of their value.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

N_CTX = 512


def perplexity(folder, text, windows):
    """Returns (perplexity, tokens of the whole text)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text)["input_ids"]
    bos = tokenizer("")["input_ids"][:1]
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, min(windows * N_CTX, len(ids) // N_CTX * N_CTX), N_CTX):
            window = torch.tensor([(bos + ids[start + len(bos):start + N_CTX])])
            logits = model(window).logits[0, N_CTX // 2 - 1:-1].double().log_softmax(-1)
            total -= logits.gather(1, window[0, N_CTX // 2:, None]).sum().item()
            count += N_CTX // 2
    return torch.tensor(total / count, dtype=torch.float64).exp().item(), len(ids)


def measured(quant, source, text, windows):
    """Returns (perplexity, tokens) by `quant eval`."""
    line = [quant, "eval", str(source), "--text", text, "--windows", str(windows), "--precise", "--json", "-", "-q"]
    report = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return report["rows"][0]


def main():
    args = argparse.ArgumentParser()
    args.add_argument("quant")
    args.add_argument("text")
    args.add_argument("sources", nargs="+")
    args.add_argument("--windows", type=int, default=4)
    args.add_argument("--format", default="f32")
    args = args.parse_args()
    transformers.logging.set_verbosity_error()
    text, bad = Path(args.text).read_text(), 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {args.windows} windows, {args.format}")
    for source in args.sources:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "dense"
            subprocess.run([args.quant, "convert", source, "--format", args.format, "-o", out, "--no-validate", "-q"], check=True)
            theirs, tokens = perplexity(out, text, args.windows)
            ours = measured(args.quant, source, args.text, args.windows)
            print(f"{source}: transformers {theirs:.5f} ({tokens} tokens), quant {json.dumps(ours)[:300]}")
    sys.exit(bad)


if __name__ == "__main__":
    main()
