// What choosing tokens at random shares: weights that are whole numbers, so that their sums have no order, and random
// numbers that are a function of where they are used. Twin, bit for bit: generate/sampling.rs.

// How a text's tokens are chosen.
struct Draw {
    float inverse_temperature; // 0: the most likely one
    float top_p;
    u64 stream; // key of its random numbers
};

// What top-p keeps of a text's next tokens, as far as it is known.
struct Nucleus {
    u64 missing;   // of the wanted sum of weights, below those that are above the threshold
    u32 threshold; // the digits found of the smallest weight that is kept
};

// e^x for x <= 0. Twin, bit for bit: backend/cpu/elementwise.rs exp.
__device__ __forceinline__ float exp_down(float x) {
    const float LEAST = -87.33654f, ROUND = 12582912.0f;
    // A NaN stays.
    float clamped = x < LEAST ? LEAST : x;
    float shifted = __fmaf_rn(clamped, 1.44269504088896340736f, ROUND);
    float n = __fsub_rn(shifted, ROUND);
    float r = __fmaf_rn(n, 2.1219444e-4f, __fmaf_rn(n, -0.6933594f, clamped));
    float p = __fmaf_rn(1.9875691e-4f, r, 1.3981999e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    float y = __fadd_rn(__fmaf_rn(__fmul_rn(r, r), p, r), 1.0f);
    int power = __float_as_int(shifted) - __float_as_int(ROUND), half = power >> 1;
    y = __fmul_rn(__fmul_rn(y, __int_as_float((half + 127) << 23)), __int_as_float((power - half + 127) << 23));
    return x < LEAST ? 0.0f : y;
}

// Returns a token's weight, below 2^30; NaN counts nothing.
__device__ __forceinline__ u32 weight_of(float logit, float largest, float inverse_temperature) {
    float y = exp_down(__fmul_rn(__fsub_rn(logit, largest), inverse_temperature));
    return __float2uint_rz(__fmul_rn(y, 1073741760.0f));
}

// Returns the random number of a text's token at `position`: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
__device__ __forceinline__ u64 random_at(u64 stream, u32 position) {
    u64 z = stream + (position + 1ull) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Returns the sum of x over the lanes of a warp up to this one.
__device__ __forceinline__ u64 running_sum_of_warp(u64 x) {
    for (u32 step = 1; step < 32; step *= 2) {
        u64 before = __shfl_up_sync(~0u, x, step);
        if (threadIdx.x % 32 >= step) x += before;
    }
    return x;
}

// Returns the sum of x over the threads of a block of 1024 up to this one; the block calls it once.
__device__ __forceinline__ u64 running_sum(u64 x) {
    __shared__ u64 sums[32];
    u32 warp = threadIdx.x / 32;
    x = running_sum_of_warp(x);
    if (threadIdx.x % 32 == 31) sums[warp] = x;
    __syncthreads();
    for (u32 before = 0; before < warp; before++) x += sums[before];
    return x;
}

// Returns whether this is the last of gridDim.x blocks to get here; to it, what the others wrote is visible. `arrived` is 0
// before and after.
__device__ __forceinline__ bool is_last_to_arrive(u32 *arrived) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived, 1) == gridDim.x - 1;
        if (is_last) *arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}
