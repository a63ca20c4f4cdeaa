#!/usr/bin/env python3
"""Writes tests/golden/tokenizers: a small SentencePiece model and the ids that transformers gives with tokenizers from before
`tokenizer.json`.

usage: golden_tokenizers.py      needs transformers, tokenizers, sentencepiece and protobuf (versions are recorded)

`sentence_piece.model` is BPE with byte fallback, trained on a part of eval/eval.txt, with a control token and a token of its own.
`ids.json` holds, for each case, the files beside it (`tokenizer_config.json`) and the ids of every probe. The byte-level cases
take their vocabulary and merges from eval/tiny-llama/tokenizer.json.
"""
import json, pathlib, shutil, tempfile
import sentencepiece, tokenizers, transformers

root = pathlib.Path(__file__).resolve().parent.parent
out = root / "tests/golden/tokenizers"
PROBES = ["Hello world", " two  spaces", "a\n\nb\tc", "It's 12345, he'LL say", "caf\u00e9 cafe\u0301 \u00fc", "\u4e2d\u6587 \U0001F642",
          "<s>x</s> <cite>y", "fn main() { let x = 0x0A; }", ""]


def ids(folder, config, model):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def main():
    cases = []
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        text = folder / "text"
        text.write_text((root / "eval/eval.txt").read_text()[:60_000])
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / "m"), model_type="bpe", vocab_size=600, byte_fallback=True,
            character_coverage=0.995, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            allow_whitespace_only_pieces=True, control_symbols=["<cite>"], user_defined_symbols=["<mine>"], num_threads=1)
        shutil.copyfile(folder / "m.model", out / "sentence_piece.model")
        for config in ({}, {"legacy": True}, {"add_prefix_space": False}):
            model = folder / "model"
            shutil.rmtree(model, ignore_errors=True)
            model.mkdir()
            shutil.copyfile(folder / "m.model", model / "tokenizer.model")
            config = {"tokenizer_class": "LlamaTokenizer", **config}
            cases.append({"files": "tokenizer.model", "config": config, "ids": ids(model, config, {"model_type": "llama"})})
        bpe = json.loads((root / "eval/tiny-llama/tokenizer.json").read_text())["model"]
        for config, kind in (({"tokenizer_class": "GPT2Tokenizer"}, "llama"), ({"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
                             ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, "llama"), ({}, "qwen3")):
            model = folder / "model"
            shutil.rmtree(model)
            model.mkdir()
            (model / "vocab.json").write_text(json.dumps(bpe["vocab"]))
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
            (model / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
            config = {**config, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
            cases.append({"files": "vocab.json, merges.txt", "config": config, "model_type": kind,
                          "ids": ids(model, config, {"model_type": kind})})
    versions = {module.__name__: module.__version__ for module in (transformers, tokenizers, sentencepiece)}
    (out / "ids.json").write_text(json.dumps({"versions": versions, "probes": PROBES, "cases": cases}, indent=None) + "\n")


if __name__ == "__main__":
    main()
