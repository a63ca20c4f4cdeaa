// compare: scores of a baseline and a model side by side, KL(baseline ‖ model) over the full vocabulary, and the rank the
// model gives to the baseline's favourite; one pass over both, a second one over the model's logits for the rank
//   baseline, model  f32 [rows, vocab]     finite logits
//   targets          u32 [rows]
//   nll              f32 [rows, 2]         baseline, model
//   top              u32 [rows, 2]
//   kld              f32 [rows]            Σ p_b (l_b - l_m) - lse_b + lse_m
//   rank             u32 [rows]            how many tokens the model prefers to the baseline's top; lower ids on ties
// The last steps run in F64: the divergence of close models is a small difference of large numbers.
// grid rows, block 512.
// Twin: backend/cpu.rs compare.
extern "C" __global__ void __launch_bounds__(THREADS)
compare(const float *__restrict__ baseline, const float *__restrict__ model, const u32 *__restrict__ targets,
        float *__restrict__ nll, u32 *__restrict__ top, float *__restrict__ kld, u32 *__restrict__ rank, u32 vocab) {
    __shared__ Softmax scratch[THREADS / 32];
    __shared__ float baseline_largest, partial[THREADS / 32];
    __shared__ u32 favourite, preferred;
    baseline += (u64)blockIdx.x * vocab;
    model += (u64)blockIdx.x * vocab;
    Softmax b = nothing_yet(), m = nothing_yet();
    float difference = 0.0f; // Σ e^(l_b - b.largest) (l_b - l_m) over this thread's entries
    for (u32 first = threadIdx.x; first < vocab; first += UNROLL * THREADS) {
        float x[UNROLL], y[UNROLL], before = b.largest;
        for (int j = 0; j < UNROLL; j++) {
            bool inside = first + j * THREADS < vocab;
            x[j] = inside ? baseline[first + j * THREADS] : -INFINITY_F;
            y[j] = inside ? model[first + j * THREADS] : -INFINITY_F;
        }
        take(b, x, first);
        take(m, y, first);
        if (b.largest > before) difference *= expf(before - b.largest);
        for (int j = 0; j < UNROLL; j++)
            if (x[j] > -INFINITY_F) difference += expf(x[j] - b.largest) * (x[j] - y[j]);
    }
    float own_largest = b.largest;
    b = merge_block(b, scratch);
    m = merge_block(m, scratch);
    if (threadIdx.x == 0) {
        baseline_largest = b.largest;
        favourite = b.top;
        preferred = 0;
    }
    __syncthreads();
    // A thread without entries has own_largest = -inf and difference 0: 0 · e^-inf = 0.
    difference = warp_sum(difference * expf(own_largest - baseline_largest));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = difference;
    float bar = model[favourite];
    u32 above = 0;
    for (u32 token = threadIdx.x; token < vocab; token += THREADS) {
        float x = model[token];
        above += x > bar || (x == bar && token < favourite);
    }
    if (above) atomicAdd(&preferred, above);
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int warp = 0; warp < THREADS / 32; warp++) total += (double)partial[warp];
        u32 row = blockIdx.x, target = targets[row];
        double shift = (double)m.largest - (double)b.largest + log((double)m.sum) - log((double)b.sum);
        kld[row] = (float)(total / (double)b.sum + shift);
        nll[2 * row] = b.largest - baseline[target] + logf(b.sum);
        nll[2 * row + 1] = m.largest - model[target] + logf(m.sum);
        top[2 * row] = b.top;
        top[2 * row + 1] = m.top;
        rank[row] = preferred;
    }
}
