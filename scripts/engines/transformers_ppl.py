"""Prints the perplexity transformers measures on a compressed-tensors folder, with the protocol of an evaluation of ours.

usage: transformers_ppl.py FOLDER TEXT EVAL_JSON
The library unpacks the weights and says whose inputs are quantized; products are F32, as in our evaluation, so that only
the reading of the file differs. Inputs of a fixed scale are quantized by the library; those of a scale per token by vLLM's rule, scale = max|x| / 127 (the library would divide by
127.5) or / 448 for FP8. Even so W8A8 agrees only statistically: a difference of 1e-7 before a rounding becomes a whole step after it.
"""
import json
import math
import pathlib
import sys

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

folder, text, evaluation = sys.argv[1:]
protocol = json.loads(pathlib.Path(evaluation).read_text())["protocol"]
n_ctx = protocol["n_ctx"]
ids = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(pathlib.Path(text).read_text(encoding="utf-8")).ids
windows = torch.tensor(ids[: n_ctx * protocol["windows"]]).reshape(-1, n_ctx)
if protocol.get("bos") is not None:
    windows[:, 0] = protocol["bos"]

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
model.hf_quantizer.compressor.decompress_model(model)
torch.nn.Module.float(model)  # MXFP4 unpacks to BF16 whatever was asked; its values are exact there.



def int8_per_token(_module, inputs):
    """Rounds every row to INT8 and back."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (torch.round(inputs[0] / scale).clamp(-127, 127) * scale,)


def fp8_per_token(_module, inputs):
    """Rounds every row to E4M3 and back."""
    scale = inputs[0].abs().amax(-1, keepdim=True) / 448
    return ((inputs[0] / scale).to(torch.float8_e4m3fn).float() * scale,)


for module in model.modules():
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and scheme.input_activations is not None:
        args = scheme.input_activations
        if (args.num_bits, args.strategy, args.dynamic) == (8, "tensor", False):
            continue
        assert (args.num_bits, args.strategy, args.dynamic) == (8, "token", True), args
        module.quantization_enabled = False
        module.register_forward_pre_hook({"int": int8_per_token, "float": fp8_per_token}[args.type])

nll = 0.0
with torch.no_grad():
    for batch in windows.split(4):
        logits = model(batch).logits[:, n_ctx // 2 : -1]
        targets = batch[:, n_ctx // 2 + 1 :]
        nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
print(math.exp(nll / (len(windows) * (n_ctx - 1 - n_ctx // 2))))
