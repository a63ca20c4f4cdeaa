//! The loss head.

use super::*;

/// Returns a random head and hidden states whose logits have a standard deviation of about 3.
fn head(random: &mut Random, n: usize, vocab: usize, hidden: usize) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let scale = 4.0 / (hidden as f32).sqrt();
    let states = random.normals(n * hidden);
    let weights =
        random.normals(vocab * hidden).iter().map(|w| half::bf16::from_f32(w * scale).to_f32()).collect();
    (states, weights, (0..n).map(|_| random.below(vocab) as u32).collect())
}

#[test]
fn score() {
    on_gpu(|cuda, _| {
        let mut random = Random(13);
        for (n, vocab, hidden) in [(1, 64, 64), (300, 1003, 128), (129, 49152, 64), (2100, 128256, 16)] {
            let (states, weights, targets) = head(&mut random, n, vocab, hidden);
            let matrix = dense(vocab, hidden, &weights, Dtype::BF16);
            fn run<B: Backend>(
                backend: &B,
                states: &[f32],
                matrix: Matrix,
                targets: &[u32],
            ) -> Vec<quant::backend::Score> {
                let states = backend.tensor(targets.len(), states.len() / targets.len(), states).unwrap();
                backend.score(&states, &backend.upload(matrix).unwrap(), targets).unwrap()
            }
            let expected = run(&Cpu, &states, matrix.clone(), &targets);
            let found = run(cuda, &states, matrix, &targets);
            let nll =
                |scores: &[quant::backend::Score]| scores.iter().map(|score| score.nll).collect::<Vec<_>>();
            assert_close("nll", &nll(&found), &nll(&expected), |_| 2e-4);
            let differ = found.iter().zip(&expected).filter(|(a, b)| a.top != b.top).count();
            assert!(
                differ * 200 <= n,
                "{differ} of {n} most likely tokens differ: more than near ties explain"
            );
        }
    });
}

#[test]
fn the_lowest_id_wins_a_tie() {
    on_gpu(|cuda, _| {
        // Every fifth token has the same, largest logit.
        let (vocab, hidden) = (40_000, 64);
        let weights: Vec<f32> =
            (0..vocab * hidden).map(|i| if i / hidden % 5 == 3 { 0.5 } else { 0.25 }).collect();
        let states = cuda.tensor(2, hidden, &vec![1.0; 2 * hidden]).unwrap();
        let weight = cuda.upload(dense(vocab, hidden, &weights, Dtype::BF16)).unwrap();
        let found = cuda.score(&states, &weight, &[7, 8]).unwrap();
        assert!(found.iter().all(|score| score.top == 3), "{found:?}");
    });
}

#[test]
fn compare() {
    on_gpu(|cuda, _| {
        let mut random = Random(14);
        for (n, vocab, hidden) in [(1, 64, 64), (300, 1003, 128), (129, 49152, 64), (1100, 128256, 16)] {
            let (states, weights, targets) = head(&mut random, n, vocab, hidden);
            // A model close to its baseline: weights off by up to a few bf16 steps.
            let nudged: Vec<f32> = weights
                .iter()
                .map(|w| half::bf16::from_f32(w * (1.0 + 0.02 * random.normal())).to_f32())
                .collect();
            fn run<B: Backend>(
                backend: &B,
                states: &[f32],
                heads: [Matrix; 2],
                targets: &[u32],
            ) -> Vec<quant::backend::Divergence> {
                let states = backend.tensor(targets.len(), states.len() / targets.len(), states).unwrap();
                let [baseline, model] = heads.map(|head| backend.upload(head).unwrap());
                backend.compare((&states, &baseline), (&states, &model), targets).unwrap()
            }
            let heads = [&weights, &nudged].map(|w| dense(vocab, hidden, w, Dtype::BF16));
            let expected = run(&Cpu, &states, heads.clone(), &targets);
            let found = run(cuda, &states, heads, &targets);
            let differ = found.iter().zip(&expected).filter(|(a, b)| a.rank != b.rank).count();
            assert!(differ * 200 <= n, "{differ} of {n} ranks differ: more than near ties explain");
            for (found, expected) in found.iter().zip(&expected) {
                let bound = 2e-6 + 1e-3 * expected.kld;
                assert!((found.kld - expected.kld).abs() <= bound, "{found:?} for {expected:?}");
                assert_eq!(found.rank == 0, found.model.top == found.baseline.top, "{found:?}");
                assert!((found.model.nll - expected.model.nll).abs() <= 2e-4, "{found:?} for {expected:?}");
                assert!(
                    (found.baseline.nll - expected.baseline.nll).abs() <= 2e-4,
                    "{found:?} for {expected:?}"
                );
            }
        }
    });
}
