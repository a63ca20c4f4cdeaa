"""Golden bytes of the compressed-tensors dialect, made by the compressed-tensors library itself.

usage: python scripts/golden_compressed_tensors.py [OUT_DIR]      (default tests/golden/compressed_tensors)

For every format one safetensors file: what the library's compressor stores for a small weight (`weight_packed`,
`weight_scale`, ...), what its decompressor makes of that (`decompressed`, BF16), and in the metadata the library's own
`quantization_config` and the versions used. Where inputs have a fixed scale, also that scale (`input_scale`), inputs
(`inputs`) and what the library makes of them (`inputs_rounded`). `tests/golden_compressed_tensors.rs` reads them.
Needs the packages that scripts/peers.sh installs.
"""
import json
import pathlib
import sys

import torch
from compressed_tensors import __version__ as version
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from safetensors.torch import save_file

MXFP4 = dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8")
NVFP4 = dict(
    num_bits=4, type="float", strategy="tensor_group", group_size=16,
    scale_dtype="torch.float8_e4m3fn", zp_dtype="torch.float8_e4m3fn",
)
FP8_PER_TOKEN = dict(num_bits=8, type="float", strategy="token", dynamic=True)
PER_TOKEN = dict(num_bits=8, type="int", strategy="token", dynamic=True)

PER_TENSOR = dict(num_bits=8, type="int", strategy="tensor", dynamic=False)

# file: (format, weights, input_activations, rows, cols)
CASES = {
    "mxfp4": ("mxfp4-pack-quantized", MXFP4, None, 8, 128),
    "nvfp4": ("nvfp4-pack-quantized", NVFP4, None, 8, 128),
    "fp8": ("float-quantized", dict(num_bits=8, type="float", strategy="channel"), None, 5, 64),
    "fp8_w8a8": ("float-quantized", dict(num_bits=8, type="float", strategy="channel"), FP8_PER_TOKEN, 5, 64),
    "int4_group128": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=128), None, 5, 256),
    "int4_group32": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=32), None, 5, 96),
    "int8_channel": ("pack-quantized", dict(num_bits=8, type="int", strategy="channel"), None, 5, 64),
    "int8_group32": ("pack-quantized", dict(num_bits=8, type="int", strategy="group", group_size=32), None, 5, 96),
    "int8_odd_width": ("pack-quantized", dict(num_bits=8, type="int", strategy="channel"), None, 3, 33),
    "int8_w8a8": ("int-quantized", dict(num_bits=8, type="int", strategy="channel"), PER_TOKEN, 5, 33),
    "int8_w8a8_static": ("int-quantized", dict(num_bits=8, type="int", strategy="channel"), PER_TENSOR, 5, 48),
}

LIMITS = {("float", 4): 6, ("float", 8): 448, ("int", 4): 7.5, ("int", 8): 127.5}


def scales(weights: dict, rows: int, cols: int) -> torch.Tensor:
    """Positive BF16 scales over many binades; powers of two for MXFP4, values of E4M3 for NVFP4."""
    groups = cols // weights.get("group_size", cols)
    exponents = torch.randint(-40, 8, (rows, groups)).float()
    if weights is NVFP4:
        exponents = torch.randint(-6, 8, (rows, groups)).float()
        return ((1 + torch.rand(rows, groups)) * 2**exponents).to(torch.float8_e4m3fn).to(torch.bfloat16)
    mantissas = torch.ones(rows, groups) if weights is MXFP4 else 1 + torch.rand(rows, groups)
    return (mantissas * 2**exponents).to(torch.bfloat16)


def weight(scale: torch.Tensor, limit: float, cols: int) -> torch.Tensor:
    """Weights that use the whole range of codes, with values past its ends."""
    unit = limit * 1.1 * (2 * torch.rand(scale.shape[0], cols) - 1)
    return (unit * scale.float().repeat_interleave(cols // scale.shape[1], 1)).to(torch.bfloat16)


def main() -> None:
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden/compressed_tensors")
    out.mkdir(parents=True, exist_ok=True)
    versions = f"compressed-tensors {version}, torch {torch.__version__.split('+')[0]}"
    for name, (fmt, weights, activations, rows, cols) in CASES.items():
        torch.manual_seed(0)
        group = dict(targets=["Linear"], weights=weights, input_activations=activations, format=fmt)
        config = QuantizationConfig(
            config_groups={"group_0": group}, format=fmt, quantization_status="compressed", ignore=["lm_head"]
        )
        scheme = config.config_groups["group_0"]
        scale = scales(weights, rows, cols)
        limit = LIMITS[weights["type"], weights["num_bits"]]
        module = {"weight": weight(scale, limit, cols), "weight_scale": scale}
        if weights is NVFP4:
            # A power of two, so that dividing by it is exact; the weights are in its units.
            module["weight_global_scale"] = torch.tensor([64.0])
            module["weight"] = module["weight"] / 64
        compressor = BaseCompressor.get_value_from_registry(fmt)
        stored = compressor.compress(module, scheme)
        back = compressor.decompress(stored, scheme)["weight"]
        tensors = {key: value.contiguous() for key, value in stored.items()}
        tensors["decompressed"] = back.to(torch.bfloat16)
        if activations is PER_TENSOR:
            # Ties between codes, and values past the ends of the range; F32, as our reference computes.
            inputs = torch.cat([torch.arange(-150, 150, 0.5), 40 * torch.randn(424)]) * 0.03125
            args = scheme.input_activations
            tensors["input_scale"] = torch.tensor([0.03125])
            tensors["inputs"] = inputs.reshape(-1, 64)
            tensors["inputs_rounded"] = fake_quantize(tensors["inputs"], tensors["input_scale"], None, args)
        metadata = {"versions": versions, "quantization_config": json.dumps(config.model_dump(mode="json"))}
        save_file(tensors, out / f"{name}.safetensors", metadata)
        print(name, {key: (str(value.dtype), tuple(value.shape)) for key, value in tensors.items()}, back.dtype)


main()
