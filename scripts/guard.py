#!/usr/bin/env python3
"""Converts small models to every format and compares what was written with a list of SHA-256: a change of structure must
not change a byte. Rows are `hash  model  method  format  dialect`; a run prints what differs and exits with 1.

usage: scripts/guard.py QUANT [--quick] [--record] [--only WORD] [--models DIR] [--smollm2 DIR]
  --quick    the embedded model only
  --record   write the list anew (rows of models that are not at hand are kept)

Hashed are all files of a folder but `quant.json`, and of a GGUF file everything but the `quant.*` keys: those tell of the
program. Calibrated codes depend on the order of floating-point sums, so the list holds for one kind of processor, named in
its first line; on another kind only rows of nearest codes are compared.
"""
import argparse, hashlib, os, struct, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests/golden/artifacts.sha256"
FOLDER = "mxfp4 nvfp4 fp8 fp8-w8a8 int4 int8 int8-w8a8".split()
GGUF = "mxfp4 q4_k_m q4_k_s q5_k_m q5_k_s q6_k q8_0 q4_0 iq4_nl iq4_xs q3_k_l q3_k_m q3_k_s q2_k".split()
CALIBRATED = [("mxfp4", "gguf"), ("int8-w8a8-static", "compressed-tensors")]
SLOW = [("mxfp4", "compressed-tensors"), ("int8-w8a8", "compressed-tensors"), ("q4_k_m", "gguf")]


def rows(model, quick):
    """Yields (method, format, dialect, options)."""
    every = [(f, "compressed-tensors") for f in FOLDER] + [(f, "gguf") for f in GGUF]
    for format, dialect in every:
        yield "rtn", format, dialect, []
    tokens = "1024" if model == "SmolLM2" else "8192"
    some = every + CALIBRATED if model == "tiny-llama" and not quick else SLOW
    for format, dialect in some:
        yield "gptq", format, dialect, ["--calib-tokens", tokens]


def processor():
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split())
    return "avx512" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else "avx2"


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def gguf_ranges(data):
    """Returns the byte ranges of a GGUF file that are no `quant.*` key."""
    at = 24
    count = struct.unpack_from("<Q", data, 16)[0]
    kept = [(0, 16)]

    def string(at):
        return at + 8 + struct.unpack_from("<Q", data, at)[0]

    def value(kind, at):
        if kind == 8:
            return string(at)
        if kind == 9:
            inner, n = struct.unpack_from("<IQ", data, at)
            at += 12
            if inner != 8:
                return at + n * SIZES[inner]
            for _ in range(n):
                at = string(at)
            return at
        return at + SIZES[kind]

    for _ in range(count):
        start, end = at, string(at)
        name = data[start + 8 : end]
        at = value(struct.unpack_from("<I", data, end)[0], end + 4)
        if not name.startswith(b"quant."):
            kept.append((start, at))
    tensors = struct.unpack_from("<Q", data, 8)[0]
    start = at
    for _ in range(tensors):
        at = string(at)
        at += 4 + 8 * struct.unpack_from("<I", data, at)[0] + 12
    kept.append((start, at))
    kept.append((at + -at % 32, len(data)))
    return kept


def digest(path):
    hash = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.iterdir() if p.name != "quant.json"):
            hash.update(file.name.encode() + b"\0")
            hash.update(file.read_bytes())
    else:
        data = path.read_bytes()
        for start, end in gguf_ranges(data):
            hash.update(data[start:end])
    return hash.hexdigest()


def recorded():
    """Returns the processor of the list and its rows."""
    if not LIST.exists():
        return processor(), {}
    head, *lines = LIST.read_text().splitlines()
    table = (line.split(None, 1) for line in lines)
    return head.split()[-1], {key: value for value, key in table}


def main():
    parse = argparse.ArgumentParser()
    parse.add_argument("quant")
    parse.add_argument("--quick", action="store_true")
    parse.add_argument("--record", action="store_true")
    parse.add_argument("--only", default="")
    parse.add_argument("--models", default=str(ROOT.parent / "shared/models"))
    parse.add_argument("--smollm2", default="")
    args = parse.parse_args()
    models = {"tiny-llama": ROOT / "eval/tiny-llama"}
    if not args.quick:
        models |= {"small-qwen3": Path(args.models) / "small-qwen3", "SmolLM2": Path(args.smollm2 or "/nonexistent")}
    where, wanted = recorded()
    found, wrong = {}, 0
    for name, folder in models.items():
        if not folder.is_dir():
            print(f"skipped {name}: no folder {folder}")
            continue
        for method, format, dialect, options in rows(name, args.quick):
            key = f"{name} {method} {format} {dialect}"
            if args.only not in key or (method == "gptq" and where != processor() and not args.record):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / ("out.gguf" if dialect == "gguf" else "out")
                command = [args.quant, "convert", folder, "--format", format, "--dialect", dialect, "--method", method]
                command += ["-o", out, "--no-validate", "--quiet", "--device", "cpu", *options]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found[key] = digest(out)
            if not args.record:
                same = wanted.get(key) == found[key]
                wrong += not same
                if not same:
                    print(f"DIFFERS {key}: {found[key]}, wanted {wanted.get(key)}", flush=True)
    if args.record:
        lines = [f"{value}  {key}" for key, value in (wanted | found).items()]
        LIST.write_text(f"# sha256 of artifacts by scripts/guard.py; calibrated rows: {processor()}\n" + "\n".join(lines) + "\n")
    print(f"{len(found) - wrong} of {len(found)} artifacts {'recorded' if args.record else 'equal'}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
