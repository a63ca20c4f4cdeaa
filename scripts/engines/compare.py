"""Prints one table of what engines measured beside what we measured; exit 1 if a row is missing or past its limit.

usage: compare.py RESULTS        lines of: our eval.json, artifact, engine, the engine's perplexity, allowed relative difference
"""
import json
import pathlib
import sys

failed = 0
print(f"{'model':<14} {'artifact':<12} {'engine':<13} {'engine PPL':>11} {'our PPL':>11} {'difference':>11}  {'allowed':>8}")
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    evaluation, artifact, engine, theirs, limit = line.split("\t")
    rows = json.loads(pathlib.Path(evaluation).read_text())["rows"]
    ours = next(row["ppl"] for row in rows if row["model"] == pathlib.Path(artifact).name)
    difference = float(theirs) / ours - 1
    bad = not abs(difference) <= float(limit)  # NaN, an engine that failed, is bad
    failed += bad
    path = pathlib.Path(artifact)
    print(
        f"{path.parent.name:<14} {path.name:<12} {engine:<13} {float(theirs):11.4f} {ours:11.4f} {difference:+11.4%}"
        f"  {float(limit):8.2%}{'  FAILED' if bad else ''}"
    )
sys.exit(f"{failed} artifacts failed" if failed else 0)
