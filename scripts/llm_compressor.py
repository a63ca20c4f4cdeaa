#!/usr/bin/env python3
"""Quantizes the linears of a model with llm-compressor 0.14 for scripts/compare.sh: INT8 per channel to nearest codes with its
MSE observer, MXFP4 by GPTQ on 128 windows of 512 tokens.

usage: scripts/llm_compressor.py MODEL_DIR int8|mxfp4 CALIBRATION_TEXT OUT_DIR
"""
import sys

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, format, text, out = sys.argv[1:]
WINDOW, WINDOWS = 512, 128
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
if format == "int8":
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel", observer="mse")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"linears": scheme}, ignore=["lm_head"]))
elif format == "mxfp4":
    ids = tokenizer(open(text).read())["input_ids"]
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)][:WINDOWS]
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * WINDOW] * len(windows)})
    recipe = GPTQModifier(targets="Linear", scheme="MXFP4A16", ignore=["lm_head"])
    oneshot(model=model, dataset=dataset, recipe=recipe, max_seq_length=WINDOW, num_calibration_samples=len(windows))
else:
    sys.exit(f"{format}: not compared")
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
