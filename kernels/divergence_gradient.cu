// divergence_gradient: gradient of KL(baseline ‖ model) in the model's logits: softmax(model) - softmax(baseline)
//   baseline, model  f32 [rows, vocab]     finite logits
//   gradient         Y [rows, vocab]       Y is float or f16
// grid rows, block 512.
// Twin: backend/cpu/head.rs divergence_gradient.
extern "C" __global__ void __launch_bounds__(THREADS)
divergence_gradient(const float *__restrict__ baseline, const float *__restrict__ model, Y *__restrict__ gradient,
                    u32 vocab) {
    __shared__ Softmax scratch[THREADS / 32];
    __shared__ float shifts[2];
    u64 start = (u64)blockIdx.x * vocab;
    baseline += start, model += start, gradient += start;
    Softmax b = softmax_of_row(baseline, vocab, scratch), m = softmax_of_row(model, vocab, scratch);
    if (threadIdx.x == 0) shifts[0] = b.largest + logf(b.sum), shifts[1] = m.largest + logf(m.sum);
    __syncthreads();
    for (u32 token = threadIdx.x; token < vocab; token += THREADS)
        store(gradient + token, expf(model[token] - shifts[1]) - expf(baseline[token] - shifts[0]));
}
