"""Writes a text that llama.cpp and tokenizer.json cut into the same tokens: the given one if they agree on it, else the
same words with single spaces (llama.cpp's `smollm` pre-tokenizer splits runs of white space differently).

usage: text.py TEXT TOKENIZER_JSON LLAMA_TOKENIZE GGUF TOKENS OUT        compares the first TOKENS ids; exit 1 if they differ
"""
import ast
import pathlib
import subprocess
import sys

from tokenizers import Tokenizer

text, tokenizer_json, llama_tokenize, model, count, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer_json)
natural = pathlib.Path(text).read_text(encoding="utf-8")
count = int(count)
for candidate in (natural, " ".join(natural.split())):
    pathlib.Path(out).write_text(candidate, encoding="utf-8")
    ours = tokenizer.encode(candidate).ids[:count]
    command = [llama_tokenize, "-m", model, "-f", out, "--ids", "--no-parse-special", "--no-escape", "--log-disable"]
    theirs = ast.literal_eval(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())[:count]
    if ours == theirs:
        what = "as it is" if candidate is natural else "with single spaces"
        print(f"{model}: {len(ours)} equal token ids, text {what}", file=sys.stderr)
        sys.exit(0)
at = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
sys.exit(f"{model}: token {at} is {theirs[at]} in llama.cpp and {ours[at]} in tokenizer.json")
