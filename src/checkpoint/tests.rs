use std::fs;

use serde_json::{Value, json};

use super::*;
use crate::container::safetensors::{SHARD_BYTES, SafetensorsSink};
use crate::container::{Opening, Sink, Storage, TensorSpec};
use crate::dialect::compressed_tensors::{CompressedTensors, config::Quantization};
use crate::names::Role;
use crate::scheme::schemes::{INT8, MXFP4, Q4_0};
use crate::tensor::bytes_from_floats;

fn config_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    })
}

/// Values that every float type holds exactly and that differ between tensors and positions.
fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 + seed * 101) % 255) as f32 / 64.0 - 2.0).collect()
}

/// A tensor of a file: name, type, shape, bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

/// Writes a folder as converters do.
fn write(folder: &Path, config: &Value, tensors: &[Stored], shard_bytes: u64) {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, _)| TensorSpec {
            name: name.clone(),
            storage: Storage::Plain(*dtype),
            shape: shape.clone(),
        })
        .collect();
    let sink = SafetensorsSink::create(folder, Opening::default(), &specs, &[], shard_bytes).unwrap();
    tensors.iter().enumerate().for_each(|(i, t)| sink.write(i, 0, &t.3).unwrap());
    sink.add_file("config.json", config.to_string().as_bytes()).unwrap();
    Box::new(sink).finish().unwrap();
}

/// The tensors that the configuration asks for, number types taking turns.
fn dense_tensors(config: &Value) -> Vec<Stored> {
    let expected = Config::from_json(config).unwrap().expected_tensors();
    let types = [Dtype::BF16, Dtype::F32, Dtype::F16].into_iter().cycle();
    (expected.into_iter().zip(types).enumerate())
        .map(|(i, ((id, shape), dtype))| {
            let bytes = bytes_from_floats(dtype, &values(i, shape.iter().product()));
            (id.hf_name(), dtype, shape, bytes)
        })
        .collect()
}

#[test]
fn one_file_shards_and_a_named_file_hold_the_same_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = dense_tensors(&config_json());
    let [whole, sharded] = ["whole", "sharded"].map(|name| dir.path().join(name));
    write(&whole, &config_json(), &tensors, SHARD_BYTES);
    write(&sharded, &config_json(), &tensors, 4000);
    for path in [&whole, &sharded, &whole.join("model.safetensors")] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.tensors.len(), tensors.len());
        assert!(!checkpoint.is_quantized());
        for (i, (name, dtype, shape, _)) in tensors.iter().enumerate() {
            let id = TensorId::from_hf(name).unwrap();
            assert_eq!(checkpoint.tensors[&id].stored, super::Stored::Dense(*dtype));
            let wanted = values(i, shape.iter().product());
            assert_eq!(checkpoint.read(id).unwrap().to_f32(), wanted, "{name}");
            let width: usize = shape[1..].iter().product();
            let rows = checkpoint.read_rows(id, 3..7).unwrap();
            assert_eq!(rows.to_f32(), wanted[3 * width..7 * width], "{name}");
        }
    }
    // Without its index, the numbering alone finds all shards.
    fs::remove_file(sharded.join("model.safetensors.index.json")).unwrap();
    assert!(Checkpoint::open(&sharded).unwrap().weight_files().count() > 2);
}

#[test]
fn old_tables_and_a_redundant_head_are_tolerated_in_a_tied_model() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    let mut tensors = dense_tensors(&config_json());
    let table = "model.layers.0.self_attn.rotary_emb.inv_freq".to_string();
    tensors.push((table, Dtype::F32, vec![4], vec![0; 16]));
    let (_, dtype, shape, bytes) = tensors[0].clone();
    tensors.push(("lm_head.weight".to_string(), dtype, shape, bytes));
    write(&folder, &config_json(), &tensors, SHARD_BYTES);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert!(!checkpoint.tensors.contains_key(&TensorId::global(Role::Head)));
}

/// The keys of a GGUF file of [`config_json`]'s model.
fn gguf_metadata() -> Metadata {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "llama");
    metadata.set("general.file_type", 2u32);
    for (key, value) in [
        ("context_length", 64u32),
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        metadata.set(&format!("llama.{key}"), value);
    }
    metadata.set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    metadata
}

#[test]
fn gguf_rows_come_in_hugging_face_order_whatever_range_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let config = Config::from_json(&config_json()).unwrap();
    let gguf = dialect::gguf::Gguf;
    let metadata = gguf_metadata();
    // As a writer: rows reordered, matrices of linears quantized, vectors F32.
    let (mut specs, mut payload, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (id, shape)) in config.expected_tensors().into_iter().enumerate() {
        let dense = Dense::from_f32(shape.clone(), &values(i, shape.iter().product()));
        let quantized = id.role.is_linear();
        let matrix = if quantized {
            let mut q = crate::scheme::QTensor::zeroed(Q4_0, shape[0], shape[1]);
            q.codes.iter_mut().enumerate().for_each(|(at, code)| *code = ((at / 3 + i) % 16) as u8);
            q.scales.iter_mut().enumerate().for_each(|(at, scale)| *scale = at as f32 + 0.5);
            Matrix::Quantized(q)
        } else {
            Matrix::Dense(dense)
        };
        let (storage, packed) = match &matrix {
            Matrix::Dense(dense) => (Storage::Plain(dense.dtype), dense.bytes.to_vec()),
            Matrix::Quantized(q) => {
                let part = &gguf.parts(&q.scheme, Activations::Full, q.rows, q.cols).unwrap()[0];
                (part.storage, gguf.pack(q, Activations::Full).unwrap().swap_remove(0))
            }
        };
        let map = gguf.place(id, shape[0], &config).rows;
        let row_bytes = packed.len() / shape[0];
        let mut bytes = vec![0; packed.len()];
        map.scatter(0..shape[0], row_bytes, &packed, |row, piece| {
            bytes[row * row_bytes..row * row_bytes + piece.len()].copy_from_slice(piece);
            Ok::<_, ()>(())
        })
        .unwrap();
        let rotated = matches!(id.role, Role::Q | Role::K);
        assert_eq!(rotated, bytes != packed, "the order does something");
        specs.push(TensorSpec { name: id.gguf_name(), storage, shape });
        payload.push(bytes);
        wanted.push((id, matrix));
    }
    let sink =
        crate::container::gguf::GgufSink::create(&path, Opening::default(), &metadata, &specs).unwrap();
    payload.iter().enumerate().for_each(|(i, bytes)| sink.write(i, 0, bytes).unwrap());
    Box::new(sink).finish().unwrap();

    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.format_name(), "q4_0");
    assert!(checkpoint.config.tie_word_embeddings && checkpoint.is_quantized());
    for (id, matrix) in wanted {
        assert_eq!(checkpoint.read(id).unwrap(), matrix, "{id}");
        let count = checkpoint.tensors[&id].shape[0];
        for rows in [0..1, 3..7, 5..count, 0..count] {
            let picked: Vec<_> = rows.clone().collect();
            assert_eq!(checkpoint.read_rows(id, rows).unwrap(), matrix.select_rows(&picked), "{id}");
        }
    }
}

#[test]
fn quantized_parts_are_one_tensor_whatever_type_their_scales_have() {
    for (scheme, scales) in [(MXFP4, Dtype::U8), (INT8, Dtype::BF16), (INT8, Dtype::F32)] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("m");
        let mut tensors = dense_tensors(&config_json());
        let id = TensorId::in_layer(0, Role::Down);
        let scheme =
            if scales == Dtype::F32 { Scheme { scale: crate::num::Codec::F32, ..scheme } } else { scheme };
        let mut q = crate::scheme::QTensor::zeroed(scheme, 32, 64);
        q.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i * 7 % 16) as u8);
        q.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = 2f32.powi(i as i32 % 5 - 2));
        tensors.retain(|tensor| tensor.0 != id.hf_name());
        let parts = CompressedTensors.parts(&scheme, Activations::Full, 32, 64).unwrap();
        let mut packed = CompressedTensors.pack(&q, Activations::Full).unwrap().into_iter();
        for part in parts {
            let Storage::Plain(dtype) = part.storage else { unreachable!() };
            let bytes = part.fixed.unwrap_or_else(|| packed.next().unwrap());
            tensors.push((format!("{}.{}", id.hf_module(), part.suffix), dtype, part.shape, bytes));
        }
        let mut config = config_json();
        let linears = [(id.hf_module(), Some((scheme, Activations::Full)))];
        let quantization = Quantization::of_plan(&linears).unwrap();
        config["quantization_config"] = quantization.to_json();
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = json!([id.hf_module()]);
        write(&folder, &config, &tensors, SHARD_BYTES);

        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!(checkpoint.tensors[&id].stored, super::Stored::Quantized(scheme, Activations::Full));
        assert_eq!(checkpoint.read(id).unwrap(), Matrix::Quantized(q.clone()));
        assert_eq!(checkpoint.read_rows(id, 5..9).unwrap(), Matrix::Quantized(q.slice_rows(5..9)));
        assert_eq!(checkpoint.format_name(), scheme.name);
    }
}
