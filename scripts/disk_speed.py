#!/usr/bin/env python3
"""Conversion beside a plain copy of the same bytes, from a cold page cache: reads the whole source, writes as many bytes
as the artifact has, flushes them. In turns, medians, as a table for the README.

usage: scripts/disk_speed.py QUANT WORK_DIR [RUNS]      RUNS: 5;  needs the checkpoint that scripts/memory.py makes in
       WORK_DIR, and as much free disk again
"""
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

FORMATS = ["int8", "q8_0", "mxfp4"]
BLOCK = 4 << 20


def evict(files):
    """Drops the files from the page cache: what is dirty is written first, since only clean pages go."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def seconds_to_copy(files, out, size):
    """Reads all files and writes `size` bytes of them, spread evenly, as a conversion does."""
    total, read, wrote = sum(path.stat().st_size for path in files), 0, 0
    evict(files)
    start = time.monotonic()
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for path in files:
        source = os.open(path, os.O_RDONLY)
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while block := os.read(source, BLOCK):
            read += len(block)
            wrote += os.write(target, block[: read * size // total - wrote])
        os.close(source)
    os.fsync(target)
    os.close(target)
    elapsed = time.monotonic() - start
    out.unlink()
    return elapsed


def convert(quant, model, files, name, work):
    """Returns seconds, processor seconds and bytes written of one conversion."""
    out = work / ("disk-speed.gguf" if name.startswith("q") else "disk-speed")
    command = [quant, "convert", model, "--format", name, "--method", "rtn", "--no-validate", "--quiet", "--force", "--out", out]
    evict(files)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elapsed, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if out.is_dir():
        size = sum(path.stat().st_size for path in out.iterdir())
        shutil.rmtree(out)
    else:
        size = out.stat().st_size
        out.unlink()
    return elapsed, cpu, size


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    quant, work = sys.argv[1], pathlib.Path(sys.argv[2])
    runs = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    model = work / "synthetic-4gb"
    files = sorted(model.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e9:.2f} GB of BF16, {runs} runs in turns, medians; {os.cpu_count()} processors\n")
    print("| | written | plain copy | quant | speed of the copy | processor | read per core |")
    print("|---|---|---|---|---|---|---|")
    for name in FORMATS:
        size = convert(quant, model, files, name, work)[2]
        copies, times, cpus = [], [], []
        for _ in range(runs):
            copies.append(seconds_to_copy(files, work / "disk-speed.copy", size))
            elapsed, cpu, _ = convert(quant, model, files, name, work)
            times.append(elapsed)
            cpus.append(cpu)
        copy, took, cpu = map(statistics.median, (copies, times, cpus))
        print(f"| {name} | {size / 1e9:.2f} GB | {copy:.1f} s | {took:.1f} s | {copy / took:.2f}× | {cpu:.1f} s | {total / 1e9 / cpu:.2f} GB/s |", flush=True)


main()
