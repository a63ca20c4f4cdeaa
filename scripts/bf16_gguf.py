"""Converts a model folder to a BF16 GGUF file with llama.cpp's convert_hf_to_gguf.py.

The converter knows a tokenizer's pre-tokenizer by a hash of what it makes of a text, and refuses others, such as those
of small models trained for tests. The name is then taken from the file that quant writes, which finds it by the
pre-tokenizer's pattern; tests/gguf_tokenizer.rs compares the tokens.

usage: PEERS/venv/bin/python scripts/bf16_gguf.py PEERS QUANT MODEL_DIR OUT.gguf
"""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

peers, quant, model, out = sys.argv[1:]
converter = next(Path(peers).glob("**/convert_hf_to_gguf.py"))
sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
from conversion.base import TextModel  # noqa: E402
from gguf import GGUFReader  # noqa: E402

known = TextModel.get_vocab_base_pre


def pre_tokenizer(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        with tempfile.TemporaryDirectory() as folder:
            ours = f"{folder}/ours.gguf"
            command = [quant, "convert", model, "--format", "q8_0", "--method", "rtn", "-o", ours]
            subprocess.run([*command, "--no-validate", "--quiet"], check=True)
            return GGUFReader(ours).get_field("tokenizer.ggml.pre").contents()


TextModel.get_vocab_base_pre = pre_tokenizer
sys.argv = [str(converter), model, "--outtype", "bf16", "--outfile", out]
runpy.run_path(str(converter), run_name="__main__")
