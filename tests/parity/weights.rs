//! Weights: decoding, embeddings, rows.

use super::*;

#[test]
fn dequantize() {
    on_gpu(|cuda, _| {
        let mut random = Random(1);
        for scheme in all_schemes() {
            for (rows, cols) in [(1, 256), (37, 768), (300, 2048)] {
                let q = random_weight(scheme, rows, cols, &mut random);
                let expected = q.decode();
                let weight = cuda.upload(Matrix::Quantized(q)).unwrap();
                let exact = cuda.read(&cuda.dequantize(&weight, Float::F32).unwrap()).unwrap();
                same_bits(scheme.name, &exact, &expected);
                let rounded: Vec<f32> = expected.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
                let half = cuda.read(&cuda.dequantize(&weight, Float::F16).unwrap()).unwrap();
                same_bits(scheme.name, &half, &rounded);
            }
        }
    });
}

#[test]
fn dequantize_every_e8m0_scale_and_f16_scale() {
    on_gpu(|cuda, _| {
        let mut mx = QTensor::zeroed(schemes::MXFP4, 255, 32);
        for (row, scale) in mx.scales.iter_mut().enumerate() {
            *scale = Codec::E8M0.decode(row as u32);
        }
        let mut q8 = QTensor::zeroed(schemes::Q8_0, 256, 32 * 248);
        for (i, scale) in q8.scales.iter_mut().enumerate() {
            // All finite halves: exponents 0 to 30, both signs.
            let bits = (i % 31744) as u32 | ((i / 31744) as u32) << 15;
            *scale = Codec::F16.decode(bits);
        }
        for mut q in [mx, q8] {
            let codes = 1 << q.scheme.element.bits();
            for (i, code) in q.codes.iter_mut().enumerate() {
                *code = ((i * 5 + i / 32) % codes) as u8;
            }
            let (name, expected) = (q.scheme.name, q.decode());
            let weight = cuda.upload(Matrix::Quantized(q)).unwrap();
            same_bits(name, &cuda.read(&cuda.dequantize(&weight, Float::F32).unwrap()).unwrap(), &expected);
        }
    });
}

#[test]
fn embed() {
    on_gpu(|cuda, _| {
        let mut random = Random(2);
        let (vocab, cols) = (1027, 256);
        let ids: Vec<u32> = (0..77).map(|_| random.below(vocab) as u32).collect();
        let mut tables: Vec<Matrix> = [Dtype::BF16, Dtype::F16, Dtype::F32]
            .map(|dtype| {
                // Dense tables lie as F16, which cuts the smallest BF16 values.
                let values = random.normals(vocab * cols).into_iter().map(|x| f16::from_f32(x).to_f32());
                dense(vocab, cols, &values.collect::<Vec<_>>(), dtype)
            })
            .into();
        for scheme in all_schemes() {
            tables.push(Matrix::Quantized(random_weight(scheme, vocab, cols, &mut random)));
        }
        for table in tables {
            let expected = Cpu.embed(&Cpu.upload(table.clone()).unwrap(), &ids).unwrap();
            let found = cuda.embed(&cuda.upload(table).unwrap(), &ids).unwrap();
            same_bits("embed", &cuda.read(&found).unwrap(), &Cpu.read(&expected).unwrap());
        }
        let table = dense(vocab, cols, &random.normals(vocab * cols), Dtype::BF16);
        assert!(
            cuda.embed(&cuda.upload(table).unwrap(), &[vocab as u32]).is_err(),
            "an id past the vocabulary"
        );
    });
}

#[test]
fn gather() {
    on_gpu(|cuda, _| {
        let mut random = Random(3);
        let x = random.normals(50 * 72);
        let rows: Vec<usize> = (0..131).map(|_| random.below(50)).collect();
        let found = cuda.select_rows(&cuda.tensor(50, 72, &x).unwrap(), &rows).unwrap();
        let expected = Cpu.select_rows(&Cpu.tensor(50, 72, &x).unwrap(), &rows).unwrap();
        same_bits("select_rows", &cuda.read(&found).unwrap(), &Cpu.read(&expected).unwrap());
    });
}
