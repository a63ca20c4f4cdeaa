#!/usr/bin/env python3
"""Writes tests/golden/gguf/TYPE.json: random blocks of every ggml type and what gguf-py decodes them to.

Needs `pip install gguf==0.19.0 numpy`. Same seed, same files.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

OUT = Path(__file__).parent.parent / "tests" / "golden" / "gguf"

# type: (blocks, byte offsets of its F16 scales)
TYPES = {
    "Q4_0": (6, [0]),
    "Q4_1": (6, [0, 2]),
    "Q5_0": (6, [0]),
    "Q5_1": (6, [0, 2]),
    "Q8_0": (6, [0]),
    "Q4_K": (2, [0, 2]),
    "Q5_K": (2, [0, 2]),
    "Q6_K": (2, [208]),
    "MXFP4": (6, []),
    # Since 2026-11-28, below the older ones, whose random numbers they leave as they are.
    "Q2_K": (2, [80, 82]),
    "Q3_K": (2, [108]),
    "IQ4_NL": (6, [0]),
    "IQ4_XS": (2, [0]),
    "TQ1_0": (2, [52]),
    "TQ2_0": (2, [64]),
    "IQ2_XXS": (8, [0]),
    "IQ2_XS": (8, [0]),
    "IQ2_S": (8, [0]),
    "IQ3_XXS": (8, [0]),
    "IQ3_S": (8, [0]),
    "IQ1_S": (8, [0]),
    "IQ1_M": (8, None),
}


def random_blocks(rng, size, blocks, f16_offsets):
    """Random bytes, with every F16 finite (either sign, subnormals possible) and every E8M0 below 255.

    The F16 of IQ1_M (offsets `None`) lies in the upper halves of four bytes; clearing one exponent bit keeps it finite.
    """
    data = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
    if f16_offsets is None:
        data[:, 55] &= 0xBF
        return data
    for offset in f16_offsets:
        bits = rng.integers(0, 1 << 16, blocks, dtype=np.uint16)
        bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000
        data[:, offset : offset + 2] = bits.astype("<u2").view(np.uint8).reshape(blocks, 2)
    if not f16_offsets:
        data[:, 0] = rng.integers(0, 255, blocks)
        data[:2, 0] = 0, 254
    return data


def main():
    rng = np.random.default_rng(20240607)
    OUT.mkdir(parents=True, exist_ok=True)
    for name, (blocks, f16_offsets) in TYPES.items():
        kind = GGMLQuantizationType[name]
        data = random_blocks(rng, GGML_QUANT_SIZES[kind][1], blocks, f16_offsets)
        values = dequantize(data, kind).astype("<f4")
        golden = {
            "made_by": f"scripts/golden_gguf.py with gguf {version('gguf')}",
            "type": name.lower(),
            "bytes": data.tobytes().hex(),
            "f32_values": values.tobytes().hex(),
        }
        (OUT / f"{name.lower()}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
