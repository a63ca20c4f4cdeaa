//! The embedded model's tokenizer through GGUF keys and back gives the same ids on real text.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use quant::dialect::gguf::tokenizer;
use quant::model::tokenizer::{Tokenizer, TokenizerFiles};

#[test]
fn the_embedded_tokenizer_survives_gguf() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = TokenizerFiles::read(&root.join("eval/tiny-llama")).unwrap().unwrap();
    let metadata = tokenizer::write(&files, 4096).unwrap();
    assert_eq!(metadata.str("tokenizer.ggml.pre").unwrap(), "qwen2");
    let back = tokenizer::read(&metadata).unwrap();
    let [original, rebuilt] = [&files, &back].map(|files| Tokenizer::from_files(files).unwrap());
    let text = std::fs::read_to_string(root.join("eval/eval.txt")).unwrap();
    for text in [text.as_str(), "<|im_start|>user\nhi<|im_end|>", "  é\u{301}\r\n\t'Ll 1234 ʼn', \u{1F600}"]
    {
        let ids = original.encode(text, true).unwrap();
        assert_eq!(rebuilt.encode(text, true).unwrap(), ids);
        assert_eq!(rebuilt.decode(&ids).unwrap(), original.decode(&ids).unwrap());
    }
    assert_eq!(original.bos(), None, "the model was trained without BOS");
    let (left, right) = (original.special_ids(), rebuilt.special_ids());
    assert_eq!((left.bos, left.eos, left.pad, rebuilt.bos()), (right.bos, right.eos, right.pad, None));
    assert_eq!(back.chat_templates, files.chat_templates);
    assert_eq!(tokenizer::write(&back, 4096).unwrap(), metadata, "writing again changes nothing");
}
