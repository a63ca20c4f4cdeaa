// fisher_gradient: a random vector of covariance diag(p) - p pᵀ for p = softmax(logits): √p ∘ ε - p · (√p · ε), ε = ±1
//   logits    f32 [rows, vocab]     finite
//   gradient  Y [rows, vocab]       Y is float or f16
// The signs depend on the seed, the row counted from first_row, and the token.
// grid rows, block 512.
// Twin: backend/cpu/head.rs fisher_gradient.

// C. Wellons' lowbias32, in the public domain.
__device__ __forceinline__ u32 hashed(u32 x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

extern "C" __global__ void __launch_bounds__(THREADS)
fisher_gradient(const float *__restrict__ logits, Y *__restrict__ gradient, u32 vocab, u32 first_row, u32 seed) {
    __shared__ Softmax scratch[THREADS / 32];
    __shared__ float sums[32], shift;
    logits += (u64)blockIdx.x * vocab;
    gradient += (u64)blockIdx.x * vocab;
    Softmax state = softmax_of_row(logits, vocab, scratch);
    if (threadIdx.x == 0) shift = state.largest + logf(state.sum);
    __syncthreads();
    u32 key = hashed(seed ^ hashed(first_row + blockIdx.x));
    auto signed_root = [&](u32 token) {
        float root = expf(0.5f * (logits[token] - shift));
        return hashed(key ^ token) & 1 ? -root : root;
    };
    float sum = 0.0f;
    for (u32 token = threadIdx.x; token < vocab; token += THREADS) sum += signed_root(token);
    sum = block_sum(sum, sums);
    for (u32 token = threadIdx.x; token < vocab; token += THREADS) {
        float root = signed_root(token);
        store(gradient + token, root - root * root * sum);
    }
}
