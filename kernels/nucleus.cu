// nucleus: a digit of the threshold of top-p: the largest t with Σ weight of the tokens of weight t and more ≥ top_p · Σ weight
//   logits   f32 [batch, vocab]
//   ids      u32 [batch]          the most likely token
//   draws    Draw [batch]         texts that take that one are left out
//   weights  u32 [batch, vocab]   written for digit 0, read for the others
//   bins     u64 [batch, 1024]    zero; left zero
//   nuclei   Nucleus [batch]      digits above this one; this one is added
//   arrived  u32 [batch]          zero; left zero
//   failed   u32 [1]              set to 1 where no token has a weight: logits are not finite
// Weights have three digits of ten bits: launched with `digit` 0 (the highest), 1, 2. Of the tokens whose digits above are the
// threshold's, weights are summed by this digit; the last block of a sequence to arrive finds the threshold's from the top.
// A block sums the low 15 bits and the rest apart, each in 32 bits, so takes at most 2^17 tokens.
// grid (blocks, batch), block 1024.
// Twin: generate/sampling.rs Draw::choose.

extern "C" __global__ void __launch_bounds__(1024)
nucleus(const float *__restrict__ logits, const u32 *__restrict__ ids, const Draw *__restrict__ draws, u32 *weights,
        u64 *bins, Nucleus *nuclei, u32 *arrived, u32 *failed, u32 vocab, u32 digit) {
    __shared__ u32 low[1024], high[1024];
    __shared__ u64 total;
    let_successor_start();
    wait_for_predecessor();
    u32 sequence = blockIdx.y;
    Draw draw = draws[sequence];
    if (draw.inverse_temperature == 0.0f) return;
    logits += (u64)sequence * vocab;
    weights += (u64)sequence * vocab;
    bins += sequence * 1024;
    const float largest = logits[ids[sequence]];
    const u32 shift = 20 - 10 * digit;
    const Nucleus found = nuclei[sequence];
    const u32 above = digit == 0 ? 0 : found.threshold;
    low[threadIdx.x] = high[threadIdx.x] = 0;
    __syncthreads();

    // Most tokens are unlikely and share digit 0: each thread sums its own.
    u64 rest = 0;
    const u32 stride = 1024 * gridDim.x;
    for (u32 first = blockIdx.x * 1024 + threadIdx.x; first < vocab; first += 4 * stride) {
        u32 four[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 i = first + j * stride;
            if (i >= vocab) four[j] = 0;
            else if (digit > 0) four[j] = weights[i];
            else four[j] = weight_of(logits[i], largest, draw.inverse_temperature);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 i = first + j * stride, weight = four[j], bin = weight >> shift & 1023;
            if (digit == 0 && i < vocab) weights[i] = weight;
            if (weight >> (shift + 10) != above) continue;
            if (bin == 0) {
                rest += weight;
            } else {
                atomicAdd(low + bin, weight & 0x7fff);
                atomicAdd(high + bin, weight >> 15);
            }
        }
    }
    rest = running_sum_of_warp(rest);
    if (threadIdx.x % 32 == 31 && rest > 0) atomicAdd(bins, rest);
    __syncthreads();
    u64 mass = ((u64)high[threadIdx.x] << 15) + low[threadIdx.x];
    if (mass > 0) atomicAdd(bins + threadIdx.x, mass);
    if (!is_last_to_arrive(arrived + sequence)) return;

    const u32 bin = 1023 - threadIdx.x;
    mass = __ldcg(bins + bin);
    bins[bin] = 0;
    u64 sum = running_sum(mass), missing = found.missing;
    if (digit == 0) {
        if (threadIdx.x == 1023) total = sum;
        __syncthreads();
        missing = (u64)ceil((double)draw.top_p * (double)total);
        if (threadIdx.x == 0 && total == 0) *failed = 1;
    }
    if (sum >= missing && sum - mass < missing) nuclei[sequence] = {missing - (sum - mass), above << 10 | bin};
}
