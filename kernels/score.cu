// score: negative log-likelihood of the target and the most likely token, one pass over each row of logits
//   logits   f32 [rows, vocab]     finite
//   targets  u32 [rows]            below vocab
//   nll      f32 [rows]            log Σ e^logit - logit[target]
//   top      u32 [rows]            index of the largest logit, the lowest on ties
// grid rows, block 512.
// Twin: backend/cpu.rs score.
extern "C" __global__ void __launch_bounds__(THREADS)
score(const float *__restrict__ logits, const u32 *__restrict__ targets, float *__restrict__ nll,
      u32 *__restrict__ top, u32 vocab) {
    __shared__ Softmax scratch[THREADS / 32];
    logits += (u64)blockIdx.x * vocab;
    Softmax state = softmax_of_row(logits, vocab, scratch);
    if (threadIdx.x == 0) {
        nll[blockIdx.x] = state.largest - logits[targets[blockIdx.x]] + logf(state.sum);
        top[blockIdx.x] = state.top;
    }
}
