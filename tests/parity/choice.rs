//! The choice of the next token, equal to the definition's: weights are whole numbers on both sides.

use quant::backend::cuda::choose::Chooser;
use quant::generate::{Draw, Sampling};

use super::*;

/// Chooses on the GPU for three texts with the same logits, at position 3 of each, and checks what comes out.
fn choose_as_the_definition(cuda: &Cuda, logits: &[f32], draws: [Draw; 3]) {
    let device = cuda.device();
    let mut chooser = Chooser::new(device, 3, logits.len(), 16).unwrap();
    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    device.write(&chooser.logits, 0, &bytes.repeat(3)).unwrap();
    draws.iter().enumerate().for_each(|(at, draw)| chooser.start(device, at, &[7, 8, 9], *draw).unwrap());
    // Twice, since kernels must leave their counters and sums as they found them.
    for position in [3, 4] {
        chooser.choose(device, 0, 3).unwrap();
        match draws.map(|draw| draw.choose(logits, position)) {
            [Some(a), Some(b), Some(c)] => {
                assert_eq!(chooser.next(device).unwrap(), [a, b, c], "{draws:?}, {} tokens", logits.len());
            }
            _ => assert!(chooser.next(device).unwrap_err().to_string().contains("not finite")),
        }
    }
}

#[test]
fn draw() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let mut random = Random(18);
    let mut scaled =
        |count: usize, scale: f32| -> Vec<f32> { random.normals(count).iter().map(|x| scale * x).collect() };
    let mut odd = scaled(5000, 3.0);
    (odd[7], odd[9]) = (f32::NAN, f32::NEG_INFINITY);
    let mut infinite = odd.clone();
    infinite[11] = f32::INFINITY;
    let ties = scaled(30_011, 8.0).iter().map(|x| x.round()).collect();
    let cases: [(Vec<f32>, f32, f32); 10] = [
        (vec![0.1, 2.0, 2.0, -1.0, 0.5], 1.0, 0.9),
        (scaled(1000, 3.0), 0.7, 0.95),
        (scaled(49_152, 3.0), 1.0, 1.0),
        (scaled(151_936, 3.0), 0.8, 0.9),
        (scaled(151_936, 2.5), 1.5, 0.999),
        (vec![0.0; 30_011], 1.0, 0.5),
        (ties, 1.0, 0.8),
        (odd, 1.0, 0.97),
        (infinite, 1.0, 0.97),
        (vec![f32::NAN; 64], 1.0, 0.97),
    ];
    for (seed, (logits, temperature, top_p)) in cases.into_iter().enumerate() {
        let sampling = Sampling { temperature, top_p, seed: seed as u64 };
        choose_as_the_definition(&cuda, &logits, [sampling.draw(0), Draw::GREEDY, sampling.draw(1)]);
        choose_as_the_definition(&cuda, &logits, [Draw::GREEDY; 3]);
    }
}
