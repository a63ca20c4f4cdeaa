// The running softmax of one row of logits, for score.cu and compare.cu.

#define THREADS 512
#define UNROLL 8

// Largest value seen with the lowest index that has it, and sum of e^(x - largest).
struct Softmax {
    float largest, sum;
    u32 top;
};

// Merges two partial results; on equal maxima the lower index wins.
__device__ __forceinline__ Softmax merge(Softmax a, Softmax b) {
    bool take_b = b.largest > a.largest || (b.largest == a.largest && b.top < a.top);
    Softmax high = take_b ? b : a, low = take_b ? a : b;
    if (low.sum > 0.0f) high.sum += low.sum * expf(low.largest - high.largest);
    return high;
}

// Takes in x[0 .. UNROLL] at indices first + j · THREADS, with one rescaling for all of them. Absent entries are -inf.
__device__ __forceinline__ void take(Softmax &state, const float x[UNROLL], u32 first) {
    float largest = x[0];
    for (int j = 1; j < UNROLL; j++) largest = fmaxf(largest, x[j]);
    if (largest > state.largest) {
        state.sum *= expf(state.largest - largest);
        state.largest = largest;
        for (int j = UNROLL - 1; j >= 0; j--)
            if (x[j] == largest) state.top = first + j * THREADS;
    }
    for (int j = 0; j < UNROLL; j++) state.sum += expf(x[j] - state.largest);
}

// Merges over the block; thread 0 gets the result.
__device__ __forceinline__ Softmax merge_block(Softmax mine, Softmax *scratch) {
    for (int lane = 16; lane > 0; lane /= 2) {
        Softmax other = {__shfl_xor_sync(~0u, mine.largest, lane), __shfl_xor_sync(~0u, mine.sum, lane),
                         __shfl_xor_sync(~0u, mine.top, lane)};
        mine = merge(mine, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < THREADS / 32; warp++) mine = merge(mine, scratch[warp]);
    return mine;
}

__device__ __forceinline__ Softmax nothing_yet() {
    Softmax state = {-INFINITY_F, 0.0f, ~0u};
    return state;
}

// Takes a row of logits in, once; thread 0 gets the result.
__device__ __forceinline__ Softmax softmax_of_row(const float *logits, u32 vocab, Softmax *scratch) {
    Softmax state = nothing_yet();
    for (u32 first = threadIdx.x; first < vocab; first += UNROLL * THREADS) {
        float x[UNROLL];
        for (int j = 0; j < UNROLL; j++) x[j] = first + j * THREADS < vocab ? logits[first + j * THREADS] : -INFINITY_F;
        take(state, x, first);
    }
    return merge_block(state, scratch);
}
