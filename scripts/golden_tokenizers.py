#!/usr/bin/env python3
"""Writes tests/golden/tokenizers: a small SentencePiece model and the ids that transformers gives with tokenizers from before
`tokenizer.json`.

usage: golden_tokenizers.py PEERS     scripts/peers.sh PEERS; transformers, tokenizers, sentencepiece and protobuf
                                      (versions are recorded)

`sentence_piece.model` is BPE with byte fallback, trained on a part of eval/eval.txt, with a control token and a token of its own.
`ids.json` holds, for each case, the files beside it (`tokenizer_config.json`) and the ids of every probe. The byte-level cases
take their vocabulary and merges from eval/tiny-llama/tokenizer.json.
`gguf.json` holds the keys that llama.cpp's convert_hf_to_gguf.py writes for such folders, long lists of the byte-level one as
SHA-256 of their JSON.
"""
import hashlib, json, pathlib, runpy, shutil, struct, sys, tempfile
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


SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5}


def converted(peers, architecture, model_type, rows, files, config):
    """Returns the tokenizer keys of the converter; the pre-tokenizer of a byte-level one, which it knows by a hash, is given."""
    converter = next(pathlib.Path(peers).glob("**/convert_hf_to_gguf.py"))
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    from conversion.base import TextModel
    from gguf import GGUFReader
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        model = {**SHAPE, "architectures": [architecture], "model_type": model_type, "vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(model))
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        sys.argv = [str(converter), place, "--vocab-only", "--outfile", str(folder / "vocab.gguf")]
        runpy.run_path(str(converter), run_name="__main__")
        fields = GGUFReader(folder / "vocab.gguf").fields
        return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def gguf_cases(peers):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    entry = lambda text, special: {"content": text, "special": special, "lstrip": False, "normalized": False, "rstrip": False,
                                   "single_word": False}
    beside = {"1": entry("<s>", True), "2": entry("</s>", True), "3": entry("<cite>", True), "4": entry("<mine>", False),
              "600": entry("<|own|>", False), "601": entry("<beside>", False)}
    piece = {"tokenizer.model": (out / "sentence_piece.model").read_bytes()}
    bpe = json.loads((root / "eval/tiny-llama/tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    bytes_ = {"vocab.json": json.dumps(bpe["vocab"]).encode(),
              "merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode()}
    end = {"bos_token": None, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer",
           "added_tokens_decoder": {str(i): entry(text, True) for i, text in
                                    enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}}
    cases = []
    for files, name, architecture, model_type, rows, config in (
            (piece, "tokenizer.model", "LlamaForCausalLM", "llama", 608, names),
            (piece, "tokenizer.model", "LlamaForCausalLM", "llama", 608, {**names, "added_tokens_decoder": beside}),
            (bytes_, "vocab.json, merges.txt", "Qwen2ForCausalLM", "qwen2", 4100, end)):
        keys = converted(peers, architecture, model_type, rows, files, config)
        for key, value in keys.items():
            if isinstance(value, list) and len(value) > 1000:
                line = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
                keys[key] = hashlib.sha256(line.encode()).hexdigest()
        cases.append({"files": name, "config": config, "model_type": model_type, "rows": rows, "keys": keys})
    return cases


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
    gguf = {"llama.cpp": "0c1e57098", "cases": gguf_cases(sys.argv[1])}
    (out / "gguf.json").write_text(json.dumps(gguf, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
