use super::*;
use crate::scheme::schemes::{ALL, FP8, INT4, INT8, int4_grouped, int8_grouped};

const SPELLINGS: [(Scheme, Activations); 9] = [
    (MXFP4, Activations::Full),
    (NVFP4, Activations::Full),
    (FP8, Activations::Full),
    (FP8, Activations::Fp8PerToken),
    (int4_grouped(32), Activations::Full),
    (INT8, Activations::Full),
    (int8_grouped(32), Activations::Full),
    (INT8, Activations::Int8PerToken),
    (INT8, Activations::Int8PerTensor(())),
];

/// Every code and every finite stored scale of the scheme, in as many rows as that takes.
fn every_code_and_scale(scheme: Scheme, cols: usize) -> QTensor {
    // As a scale, E4M3 has no sign.
    let bits = if scheme.scale == Codec::E4M3 { 7 } else { scheme.scale.bits() };
    let scales: Vec<f32> =
        (0..1u32 << bits).map(|bits| scheme.scale.decode(bits)).filter(|s| s.is_finite()).collect();
    let per_row = scheme.group.count(1, cols);
    let rows = scales.len().div_ceil(per_row);
    let mut q = QTensor::zeroed(scheme, rows, cols);
    q.scales.fill(1.0);
    q.scales[..scales.len()].copy_from_slice(&scales);
    let codes = 1usize << scheme.element.bits();
    // Shifted by the row, so that each code also meets every neighbour position.
    q.codes.iter_mut().enumerate().for_each(|(i, code)| *code = ((i + i / cols) % codes) as u8);
    if scheme.element == Element::E4M3 {
        // No NaN.
        q.codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code = 0);
    }
    q.outer_scales.fill(0.125);
    q
}

fn slices(parts: &[Vec<u8>]) -> Vec<&[u8]> {
    parts.iter().map(Vec::as_slice).collect()
}

#[test]
fn unpack_inverts_pack_for_every_code_and_every_scale() {
    for (scheme, activations) in SPELLINGS {
        let q = every_code_and_scale(scheme, 256);
        let packed = CompressedTensors.pack(&q, activations).unwrap();
        let back = CompressedTensors.unpack(&scheme, activations, q.rows, q.cols, &slices(&packed)).unwrap();
        assert!(back == q, "{} {activations:?}", scheme.name);
    }
}

#[test]
fn pack_inverts_unpack_for_every_byte() {
    for (scheme, activations) in SPELLINGS {
        let parts = CompressedTensors.parts(&scheme, activations, 2, 256).unwrap();
        let bytes: Vec<Vec<u8>> = parts
            .iter()
            .filter(|part| part.fixed.is_none())
            // 0..=126 as the high byte of a BF16 scale is finite, and as an E8M0 scale too.
            .map(|part| (0..part.storage.bytes(&part.shape)).map(|i| (i % 127) as u8).collect())
            .collect();
        let q = CompressedTensors.unpack(&scheme, activations, 2, 256, &slices(&bytes)).unwrap();
        assert_eq!(CompressedTensors.pack(&q, activations).unwrap(), bytes, "{}", scheme.name);
    }
}

#[test]
fn parts_describe_what_pack_returns_and_hold_slices_of_rows() {
    for (scheme, activations) in SPELLINGS {
        for cols in [64, 96] {
            let q = every_code_and_scale(scheme, cols);
            let whole = CompressedTensors.pack(&q, activations).unwrap();
            let parts = CompressedTensors.parts(&scheme, activations, q.rows, cols).unwrap();
            for (bytes, part) in whole.iter().zip(parts.iter().filter(|part| part.fixed.is_none())) {
                assert_eq!(bytes.len() as u64, part.storage.bytes(&part.shape), "{}", part.suffix);
                assert!(part.shape[0] == q.rows || part.shape == [1]);
            }
            let mut first = QTensor::zeroed(scheme, 1, cols);
            first.codes.copy_from_slice(&q.codes[..cols]);
            first.scales.copy_from_slice(&q.scales[..q.groups_per_row()]);
            first.outer_scales.copy_from_slice(&q.outer_scales);
            for (row, all) in CompressedTensors.pack(&first, activations).unwrap().iter().zip(&whole) {
                assert_eq!(row[..], all[..row.len()]);
            }
        }
    }
}

#[test]
fn odd_widths_are_padded_to_whole_words() {
    let q = every_code_and_scale(INT8, 33);
    let parts = CompressedTensors.parts(&INT8, Activations::Full, q.rows, 33).unwrap();
    assert_eq!((parts[0].suffix, &parts[0].shape), ("weight_packed", &vec![q.rows, 9]));
    let shape = parts[2].fixed.as_deref().unwrap();
    assert_eq!(shape, [q.rows as i64, 33].map(i64::to_le_bytes).concat());
    let packed = CompressedTensors.pack(&q, Activations::Full).unwrap();
    assert_eq!(packed[0].len(), q.rows * 36);
    let back = CompressedTensors.unpack(&INT8, Activations::Full, q.rows, 33, &slices(&packed)).unwrap();
    assert!(back == q);
}

#[test]
fn scales_of_any_float_type_are_read() {
    for (codec, bytes) in [(Codec::F32, vec![0, 0, 0, 0x3f]), (Codec::F16, vec![0, 0x38])] {
        let scheme = Scheme { scale: codec, ..INT8 };
        let q = CompressedTensors
            .unpack(&scheme, Activations::Int8PerToken, 1, 2, &[&[0xff, 0x80], &bytes])
            .unwrap();
        assert_eq!(q.decode(), [-0.5, -64.0], "{codec:?}");
    }
}

#[test]
fn schemes_without_a_spelling_are_refused_with_the_cure() {
    for scheme in ALL.into_iter().filter(|scheme| ![MXFP4, NVFP4, FP8, INT4, INT8].contains(scheme)) {
        let error = Format::of(&scheme, Activations::Full).unwrap_err().to_string();
        assert!(error.contains(scheme.name) && error.contains("--dialect gguf"), "{error}");
    }
    let error = Format::of(&MXFP4, Activations::Fp8PerToken).unwrap_err().to_string();
    assert!(error.contains("FP8 weights"), "{error}");
    for (scheme, cure) in [(int8_grouped(128), "--group-size"), (MXFP4, "8-bit integer weights")] {
        let error = Format::of(&scheme, Activations::Int8PerToken).unwrap_err().to_string();
        assert!(error.contains(cure), "{error}");
    }
    let error = CompressedTensors.parts(&MXFP4, Activations::Full, 4, 80).unwrap_err().to_string();
    assert_eq!(error, "80 columns are not a multiple of the 32 that share a scale");
}

#[test]
fn nan_scales_and_wrong_sizes_are_refused() {
    let error = |scheme: &Scheme, codes: &[u8], scales: &[u8]| {
        let parts = [codes, scales];
        let result = CompressedTensors.unpack(scheme, Activations::Full, 1, 32, &parts);
        format!("{:#}", result.unwrap_err())
    };
    assert!(error(&MXFP4, &[0; 16], &[255]).starts_with("`weight_scale`: scale 0 is NaN"));
    assert!(error(&INT8, &[0; 32], &[0x80, 0x7f]).starts_with("`weight_scale`: scale 0 is inf"));
    assert_eq!(error(&MXFP4, &[0; 15], &[127]), "`weight_packed` has 15 bytes, wanted 16");
}
