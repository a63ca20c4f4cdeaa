#!/usr/bin/env python3
"""Peak memory of evaluation and calibration on a GPU, as they like it and within limits: the numbers must be the same, the
limits must hold. Prints a Markdown table; exit 1 if something does not hold.

usage: scripts/gpu_memory.py QUANT MODEL TEXT WORK_DIR [VRAM_GB=12] [RAM_GB=24]

MODEL is a BF16 folder (scripts/random_llama.py writes one of Llama-3-8B's shape), TEXT has 262,144 tokens or more. Nothing
else may use the GPU meanwhile.
"""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time


def gpu_bytes():
    query = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20


def run(command):
    """Runs a command; returns seconds, peak GPU bytes, peak resident bytes."""
    before, peak, done = gpu_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, gpu_bytes() - before)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.time()
    process = subprocess.Popen([str(word) for word in command])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.time() - start
    done.set()
    watcher.join()
    if status:
        sys.exit(f"{' '.join(map(str, command))}: status {status}")
    return seconds, peak, usage.ru_maxrss * 1024


def rows(report):
    return [(row["ppl"], row["kld"]) for row in json.loads(report.read_text())["rows"]]


def main():
    quant, model, text, work = (pathlib.Path(word) for word in sys.argv[1:5])
    vram, ram = (float(word) for word in (sys.argv[5:7] + ["12", "24"][len(sys.argv) - 5 :]))
    work.mkdir(parents=True, exist_ok=True)
    limits = ["--vram", f"{vram}G", "--ram", f"{ram}G"]
    failed = False
    print("| what | limits | seconds | GPU | host |\n|---|---|---|---|---|")

    def line(what, within, found):
        nonlocal failed
        seconds, gpu, host = found
        failed |= bool(within) and (gpu > vram * 1e9 or host > ram * 1e9)
        shown = f"{vram:g} and {ram:g} GB" if within else "none"
        print(f"| {what} | {shown} | {seconds:.1f} | {gpu / 1e9:.2f} GB | {host / 1e9:.2f} GB |", flush=True)

    small = work / "q4_k_m.gguf"
    if not small.exists():
        run([quant, "convert", model, "--format", "q4_k_m", "--method", "rtn", "--no-validate", "-o", small])
    found = []
    for within in [[], limits]:
        report = work / "report.json"
        command = [quant, "eval", small, "--baseline", model, "--kld", "--protocol", "full", "--windows", "16"]
        command += ["--text", text, "--device", "cuda:0", "--json", report, *within]
        line("evaluation: BF16 and Q4_K_M, 16 windows of 2,048", within, run(command))
        found.append(rows(report))
    worst = max(abs(a - b) / abs(a) for x, y in zip(*found) for a, b in zip(x, y) if a)
    failed |= worst > 1e-4
    print(f"\nlargest relative difference of PPL and KLD: {worst:.2g}\n", flush=True)

    hashes = set()
    for within in [[], limits]:
        out = work / "mxfp4"
        command = [quant, "convert", model, "--format", "mxfp4", "--method", "gptq", "--effort", "fast", "--no-validate"]
        command += ["--calib", text, "--calib-tokens", 262144, "--calib-ctx", 2048, "--device", "cuda:0", "--force", "-o", out]
        line("calibrated MXFP4, 128 windows of 2,048", within, run([*command, *within]))
        digest = hashlib.sha256()
        for file in sorted(out.glob("*.safetensors")):
            digest.update(file.read_bytes())
        hashes.add(digest.hexdigest())
    failed |= len(hashes) > 1
    print("\nthe same bytes" if len(hashes) == 1 else "\nBYTES DIFFER")
    sys.exit(failed)


main()
