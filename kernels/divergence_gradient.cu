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
    Softmax b = nothing_yet(), m = nothing_yet();
    for (u32 first = threadIdx.x; first < vocab; first += UNROLL * THREADS) {
        float x[UNROLL], y[UNROLL];
        for (int j = 0; j < UNROLL; j++) {
            bool inside = first + j * THREADS < vocab;
            x[j] = inside ? baseline[first + j * THREADS] : -INFINITY_F;
            y[j] = inside ? model[first + j * THREADS] : -INFINITY_F;
        }
        take(b, x, first);
        take(m, y, first);
    }
    b = merge_block(b, scratch);
    m = merge_block(m, scratch);
    if (threadIdx.x == 0) shifts[0] = b.largest + logf(b.sum), shifts[1] = m.largest + logf(m.sum);
    __syncthreads();
    for (u32 token = threadIdx.x; token < vocab; token += THREADS)
        store(gradient + token, expf(model[token] - shifts[1]) - expf(baseline[token] - shifts[0]));
}
