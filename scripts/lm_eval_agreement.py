"""Checks that `quant eval --tasks` scores as lm-evaluation-harness does, item by item.

    pip install lm-eval torch transformers
    python scripts/lm_eval_agreement.py target/release/quant MODEL_FOLDER [QUESTIONS_PER_TASK]

Writes small benchmarks of its own in the formats of MMLU, HellaSwag, ARC and GSM8K, runs both programs on them in F32 with two
examples before each question, and compares log-likelihoods, choices, generated answers and scores. Fails where a
log-likelihood differs by more than 1e-3 nats, or more than 1 % of the answers differ.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

SHOTS = 2
PACKAGED = pathlib.Path(lm_eval.__file__).parent / "tasks"
INCLUDES = {
    "mmlu": "mmlu/default/mmlu_anatomy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc": "arc/arc_easy.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
NAMES = ["Ada", "Ben", "Cleo", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Jun"]
THINGS = ["apples", "pens", "stamps", "coins", "books", "shells"]
KINDS = {
    "animal": ["horse", "owl", "salmon", "beetle", "goat"],
    "colour": ["red", "green", "violet", "orange", "grey"],
    "tool": ["hammer", "saw", "wrench", "drill", "chisel"],
    "fruit": ["pear", "plum", "mango", "fig", "cherry"],
    "metal": ["iron", "copper", "tin", "zinc", "silver"],
}
SCENES = [
    ("Cooking", "A woman cuts an onion on a board.", "she", ["puts it into a hot pan.", "drives the board to work.", "sings to the river [laughs] loudly.", "sleeps under the onion."]),
    ("Cycling", "Two boys push their bicycles up a hill.", "then they", ["roll down on the other side.", "eat the hill with a fork.", "paint the moon [title] green.", "hide in a small bottle."]),
    ("Painting", "A man opens a tin of white paint.", "he", ["dips his brush into it.", "drinks the ladder.", "folds the wall and leaves.", "calls the paint by its name."]),
    ("Fishing", "A girl sits on the bank with a rod.", "after a while she", ["pulls a fish from the water.", "reads the fish  a letter.", "ties the lake to a tree.", "turns into a stone bridge."]),
]


def choices(rng):
    kind = rng.choice(list(KINDS))
    right = rng.choice(KINDS[kind])
    wrong = [rng.choice(words) for other, words in KINDS.items() if other != kind]
    options = [right] + rng.sample(wrong, 3)
    rng.shuffle(options)
    return kind, options, options.index(right)


def mmlu(rng):
    kind, options, gold = choices(rng)
    return {"question": f" Which of these is a {kind}? ", "subject": "anatomy", "choices": options, "answer": gold}


def arc(rng):
    kind, options, gold = choices(rng)
    labels = rng.choice([list("ABCD"), list("1234")])
    return {"id": str(rng.random()), "question": f"{rng.choice(NAMES)} looks for a {kind}. What should be taken?",
            "choices": {"text": [f"a piece of {o}" if rng.random() < .3 else o for o in options], "label": labels}, "answerKey": labels[gold]}


def hellaswag(rng):
    label, first, second, endings = rng.choice(SCENES)
    order = rng.sample(range(4), 4)
    return {"activity_label": label, "ctx_a": f"{rng.choice(NAMES)} watches. {first}", "ctx_b": second,
            "endings": [endings[i] for i in order], "label": str(order.index(0))}


def gsm8k(rng):
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 900), rng.randint(2, 900)
    return {"question": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
            "answer": f"{name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b:,}"}


def write(folder, count):
    rng = random.Random(7)
    for name, make in {"mmlu": mmlu, "hellaswag": hellaswag, "arc": arc, "gsm8k": gsm8k}.items():
        rows = [json.dumps(make(rng)) for _ in range(SHOTS + (count if name != "gsm8k" else min(count, 20)))]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        (folder / f"{name}.shots.jsonl").write_text("\n".join(rows[:SHOTS]) + "\n")
        (folder / f"{name}.test.jsonl").write_text("\n".join(rows[SHOTS:]) + "\n")
        (folder / f"{name}.yaml").write_text(
            f"include: {PACKAGED / INCLUDES[name]}\n"
            f"task: local_{name}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n    test: {folder / name}.test.jsonl\n    shots: {folder / name}.shots.jsonl\n"
            "training_split: null\nvalidation_split: null\ntest_split: test\nfewshot_split: shots\n"
            "fewshot_config:\n  sampler: first_n\n")


def main():
    binary, model, count = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 40
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write(folder, count)
        tasks = ",".join(f"{name}={folder / name}.jsonl" for name in INCLUDES)
        report = folder / "report.json"
        subprocess.run([binary, "eval", model, "--tasks", tasks, "--shots", str(SHOTS), "--windows", "1", "--quiet",
                        "--device", "cpu", "--max-new-tokens", "64", "--json", str(report)], check=True, stdout=subprocess.DEVNULL)
        ours = {task["task"]: task["rows"][0] for task in json.loads(report.read_text())["tasks"]}
        lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=8)
        theirs = lm_eval.simple_evaluate(
            model=lm, tasks=[f"local_{name}" for name in INCLUDES], num_fewshot=SHOTS, log_samples=True, bootstrap_iters=0,
            gen_kwargs={"max_gen_toks": 64}, task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    failed = False
    print(f"lm-eval {lm_eval.__version__}, {model}")
    for name in INCLUDES:
        row, samples = ours[name], theirs["samples"][f"local_{name}"]
        scores = {score["metric"]: score["value"] for score in row["scores"]}
        published = theirs["results"][f"local_{name}"]
        if name == "gsm8k":
            strict = {s["doc_id"]: s for s in samples if s["filter"] == "strict-match"}
            flexible = {s["doc_id"]: s for s in samples if s["filter"] == "flexible-extract"}
            same = sum(item["answers"] == [flexible[i]["filtered_resps"][0], strict[i]["filtered_resps"][0]] for i, item in enumerate(row["items"]))
            worst, items = 0.0, len(row["items"])
            pairs = [(scores[f"exact_match,{f}"], published[f"exact_match,{f}"]) for f in ("flexible-extract", "strict-match")]
        else:
            samples = sorted(samples, key=lambda sample: sample["doc_id"])
            worst, same, items = 0.0, 0, len(samples)
            for item, sample in zip(row["items"], samples, strict=True):
                theirs_ll = [float(r[0][0]) for r in sample["resps"]]
                worst = max([worst] + [abs(a - b) for a, b in zip(item["log_likelihoods"], theirs_ll, strict=True)])
                same += item["right"][-1] == bool(sample["acc"]) and max(range(4), key=item["log_likelihoods"].__getitem__) == max(range(4), key=theirs_ll.__getitem__)
            pairs = [(scores[m], published[f"{m},none"]) for m in scores]
        print(f"{name:10} {items} items, same answer {same}, largest difference of a log-likelihood {worst:.2e}, scores (ours, theirs) "
              + ", ".join(f"{a:.4f} {b:.4f}" for a, b in pairs))
        failed |= worst > 1e-3 or same < 0.99 * items
    sys.exit(failed)


main()
