//! Sequences that come and go in a decoder.

use quant::generate::{Decoder, Draw, Sampling};

/// Tokens that a decoder of [`come_and_go`] holds of each of its three sequences.
pub const CAPACITY: usize = 32;

/// Continues sequences of different lengths, of which one idles and is replaced and two are sampled, and shows each one's
/// tokens with the logits that follow them. Every choice must be the definition's, and empty and full sequences refused.
pub fn come_and_go(decoder: &mut dyn Decoder, vocab: u32, see: &mut dyn FnMut(&[u32], &[f32])) {
    let sampled = |prompt| Sampling { temperature: 0.9, top_p: 0.9, seed: 5 }.draw(prompt);
    let mut draws = [Draw::GREEDY, Draw::GREEDY, sampled(2)];
    let prompt = |count: u32, seed: u32| (0..count).map(|i| (i + seed) * 7919 % vocab).collect::<Vec<_>>();
    let mut sequences = [prompt(3, 1), prompt(17, 2), prompt(9, 3)];
    assert!(decoder.step(&[Some(1), None, None]).is_err(), "an empty sequence");
    for at in 0..3 {
        decoder.prefill(at, &sequences[at], draws[at]).unwrap();
    }
    for step in 0..20 {
        if step == 8 {
            (sequences[1], draws[1]) = (prompt(5, 9), sampled(1));
            decoder.prefill(1, &sequences[1], draws[1]).unwrap();
        }
        let mut tokens = [0, 1, 2].map(|at| Some((step * 5 + 20 * at) % vocab));
        if step < 8 {
            tokens[1] = None;
        }
        decoder.step(&tokens).unwrap();
        let (logits, next) = (decoder.logits().unwrap(), decoder.next_tokens().unwrap());
        for (at, logits) in logits.chunks(vocab as usize).enumerate() {
            let Some(token) = tokens[at] else { continue };
            sequences[at].push(token);
            see(&sequences[at], logits);
            assert_eq!(Some(next[at]), draws[at].choose(logits, sequences[at].len()), "step {step}, {at}");
        }
    }
    let last = [None, None, Some(1)];
    (sequences[2].len()..CAPACITY).for_each(|_| decoder.step(&last).unwrap());
    assert!(decoder.step(&last).is_err(), "a full sequence");
}
