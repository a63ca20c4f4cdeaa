"""Proves that transformers reads what `quant convert --format f32` (or bf16, f16) writes as the model that it was made from.

    python scripts/dense_crosscheck.py QUANT TEXT SOURCE... [--windows N] [--format f32]

Each SOURCE (a GGUF file, a folder) is written as an ordinary folder. Needs torch and transformers. Printed for each: the tokens
that transformers makes of the text, and the perplexity of the folder in transformers (F32) beside that of the source in `quant`.
Exit status 1 if they differ by more than a hundred-thousandth; where values are rounded to 16 bits, by more than a hundredth.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

N_CTX = 512
TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "bf16": 1e-2}


def perplexity(folder, text, windows):
    """Returns (perplexity as llama-perplexity counts it, tokens of the whole text)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, first = tokenizer(text)["input_ids"], tokenizer("")["input_ids"][:1]
    total, half = 0.0, N_CTX // 2
    with torch.no_grad():
        for start in range(0, windows * N_CTX, N_CTX):
            window = torch.tensor([first + ids[start + len(first):start + N_CTX]])
            logits = model(window).logits[0, half:-1].double().log_softmax(-1)
            total -= logits.gather(1, window[0, half + 1:, None]).mean().item()
    return math.exp(total / windows), len(ids)


def measured(quant, source, text, windows):
    """Returns the perplexity by `quant eval`."""
    line = [quant, "eval", source, "--text", text, "--windows", str(windows), "--precise", "--device", "cpu", "--json", "-", "-q"]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)["rows"][0]["ppl"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quant")
    parser.add_argument("text")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--format", default="f32")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text, bad = Path(args.text).read_text(), False
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {args.windows} windows, {args.format}")
    for source in args.sources:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "dense")
            line = [args.quant, "convert", source, "--format", args.format, "-o", out, "--no-validate", "-q"]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            theirs, tokens = perplexity(out, text, args.windows)
            ours = measured(args.quant, source, args.text, args.windows)
        bad |= abs(theirs / ours - 1) > TOLERANCE[args.format]
        print(f"{source}: {tokens} tokens; perplexity {theirs:.6f} in transformers, {ours:.6f} of the source in quant")
    sys.exit(bad)


if __name__ == "__main__":
    main()
