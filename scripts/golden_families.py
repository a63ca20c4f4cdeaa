"""Writes a tiny random checkpoint and its logits for every family of families.py, laid out as by logit_reference.py.

    python scripts/golden_families.py [NAME...]          OUT=FOLDER to write elsewhere

Needs torch, transformers 5.17 and safetensors. Every option of a family is set so that it matters within 24 tokens:
windows are shorter, soft caps small, gains, biases and sinks random. To prove it, each option under `matters` is
changed in turn with the same weights, and the script fails where no logit moves. Logits are computed in F32 and again
in F64; the difference, which it prints, shows what the order of sums can do (3e-5 at most).
"""

import json
import os
import sys
import zlib
from pathlib import Path

import safetensors
import torch
import transformers
from families import FAMILIES
from logit_reference import TOKENS, old_spelling
from safetensors.torch import load_file, save_file

MOVED = 0.01  # a changed option moves some logit by at least this


def is_stacked(name, tensor):
    """Whether each slice is one expert's matrix [out, in]; gpt-oss and Llama 4 keep [in, out]."""
    return tensor.dim() == 3 and "experts" in name


def spread(name, tensor, transposed):
    """The standard deviation that gives a product's outputs one of about 1.5."""
    if "embed" in name:
        return 1.0
    if name.endswith("conv1d.weight"):
        return tensor.shape[-1] ** -0.5
    rows = 1 if is_stacked(name, tensor) and transposed else -1
    return 1.5 / tensor.shape[rows] ** 0.5


def random_weights(model, name, family):
    """Gains near their neutral value, biases near 0, the rest as `spread` says; exact in BF16 but for router biases."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, tensor in sorted(model.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() >= 2 and not key.endswith("bias") and "norm" not in key:
            value = noise * spread(key, tensor, family.transposed)
        elif key.endswith("A_log"):
            value = noise - 1.5
        elif key.endswith("sinks"):
            value = noise
        else:
            value = 0.3 * noise + (1.0 if bool((tensor == 1).all()) else 0.0)
        value *= next((factor for part, factor in family.louder.items() if part in key), 1.0)
        tensor.copy_(value if key.endswith("correction_bias") else value.to(torch.bfloat16).float())


def class_of(family):
    return getattr(transformers, family.model or family.config.replace("Config", "ForCausalLM").replace("Text", ""))


def build(family, options):
    config = getattr(transformers, family.config)(**options)
    config._attn_implementation = config._experts_implementation = "eager"
    return class_of(family)._from_config(config, dtype=torch.float32).eval()


def logits_of(model, ids):
    # The whole sequence at once; a cache would only reorder sums.
    return model(input_ids=ids, use_cache=False).logits[0].float()


def changed(options, path, value):
    """`options` with the dotted `path` set to `value`."""
    head, _, rest = path.partition(".")
    return {**options, head: changed(options[head], rest, value) if rest else value}


def check_options(family, model, ids, logits):
    for path, value in family.matters.items():
        zeroed = path.removeprefix("zero ") if path.startswith("zero ") else None
        other = build(family, family.options if zeroed else changed(family.options, path, value))
        other.load_state_dict(model.state_dict(), strict=False)
        for key, tensor in other.state_dict().items():
            if zeroed and zeroed in key:
                tensor.zero_()
        moved = (logits_of(other, ids) - logits).abs().max().item()
        if not moved > MOVED:
            sys.exit(f"{path}: {value} instead moves no logit by more than {moved}")


def stack_experts(tensors):
    """Joins `experts.N.*_proj.weight` to `experts.gate_up_proj` [experts, 2 * inner, hidden] and `experts.down_proj`."""
    stacked = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for layer in {key.partition("experts.")[0] for key in tensors if ".experts." in key}:
        gate, up, down = (
            torch.stack([tensors[key] for key in sorted(tensors) if key.startswith(layer + "experts.") and part in key])
            for part in ("gate_proj", "up_proj", "down_proj"))
        stacked |= {layer + "experts.gate_up_proj": torch.cat([gate, up], dim=1), layer + "experts.down_proj": down}
    return stacked


def save(folder, model, family):
    """As `save_pretrained` does it, in BF16; only the router's correction bias stays in F32, as DeepSeek stores it."""
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith("correction_bias")}
    model.to(torch.bfloat16)
    for key, tensor in kept.items():
        module, _, leaf = key.rpartition(".")
        getattr(model.get_submodule(module), leaf).data = tensor
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    more = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in family.untouched.items()}
    tensors = load_file(path) | more
    save_file(stack_experts(tensors) if family.stacked else tensors, path, metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family.old:
        path = folder / "config.json"
        spelled = json.loads(path.read_text())
        old_spelling(spelled, "rope_type")
        spelled.pop("layer_types", None)
        path.write_text(json.dumps(spelled, indent=2) + "\n")


def check_saved(folder, family, ids, logits):
    """What lies on disk, read as any user reads it, has these logits to the last bit."""
    saved = class_of(family).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    if not torch.equal(logits_of(saved, ids), logits):
        sys.exit(f"{folder} has other logits once saved")


@torch.no_grad()
def write(folder, name, family):
    model = build(family, family.options)
    random_weights(model, name, family)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    logits = logits_of(model, ids)
    check_options(family, model, ids, logits)
    difference = (logits_of(model.double(), ids) - logits).abs().max().item()
    model.float()
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, model, family)
    check_saved(folder, family, ids, logits)
    save_file({"ids": ids[0].int(), "logits": logits.contiguous()}, folder.with_suffix(".safetensors"))
    size = sum(file.stat().st_size for file in [*folder.iterdir(), folder.with_suffix(".safetensors")])
    print(f"{name}: logits {logits.min():.2f} .. {logits.max():.2f}, F64 differs by {difference:.1e}, {size} bytes")


def main():
    out = Path(os.environ.get("OUT") or Path(__file__).parent.parent / "tests/golden/logits")
    for name in sys.argv[1:] or FAMILIES:
        family = FAMILIES[name]
        if not hasattr(transformers, family.config):
            print(f"{name}: transformers {transformers.__version__} has no {family.config}: skipped")
            continue
        write(out / name, name, family)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, safetensors)}
    (out / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
