// advance: ends a decoding step: picks the most likely token, records it, and moves the sequence on
//   logits     f32 [batch, vocab]
//   ids        u32 [batch]             the token to embed next; written
//   positions  u32 [batch]             incremented
//   history    u32 [batch, capacity]   history[i, positions[i]] = the token fed at that position; written for the next
//   best       f32, u32 [batch, gridDim.x]  each block's most likely token
//   arrived    u32 [batch]             zero; left zero
//   failed     u32 [1]                 set to 1 where no logit is a number; token 0 is picked then
// The lowest index wins ties. The last block of a sequence to arrive merges.  grid (up to 32, batch), block 1024.
// Twin: the top of score.cu.

__device__ __forceinline__ void keep_best(float &best, u32 &index, float other, u32 other_index) {
    if (other > best || (other == best && other_index < index)) best = other, index = other_index;
}
__device__ __forceinline__ void best_of_warp(float &best, u32 &index) {
    for (int lane = 16; lane > 0; lane /= 2)
        keep_best(best, index, __shfl_xor_sync(~0u, best, lane), __shfl_xor_sync(~0u, index, lane));
}

extern "C" __global__ void __launch_bounds__(1024)
advance(const float *__restrict__ logits, u32 *__restrict__ ids, u32 *__restrict__ positions, u32 *__restrict__ history,
        uint2 *best_of_blocks, u32 *arrived, u32 *__restrict__ failed, u32 vocab, u32 capacity) {
    __shared__ float values[32];
    __shared__ u32 indices[32];
    let_successor_start();
    wait_for_predecessor();
    u32 sequence = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    logits += (u64)sequence * vocab;
    best_of_blocks += sequence * gridDim.x;
    float best = -INFINITY_F;
    u32 index = ~0u;
#pragma unroll 4
    for (u32 i = blockIdx.x * 1024 + threadIdx.x; i < vocab; i += 1024 * gridDim.x) {
        float x = logits[i];
        if (x > best) best = x, index = i;
    }
    best_of_warp(best, index);
    if (lane == 0) values[warp] = best, indices[warp] = index;
    __syncthreads();
    if (warp > 0) return;
    best = values[lane], index = indices[lane];
    best_of_warp(best, index);
    u32 ticket = 0;
    if (lane == 0) {
        __stcg(best_of_blocks + blockIdx.x, make_uint2(__float_as_uint(best), index));
        __threadfence();
        ticket = atomicAdd(arrived + sequence, 1);
    }
    if (__shfl_sync(~0u, ticket, 0) != gridDim.x - 1) return;
    __threadfence();
    best = -INFINITY_F, index = ~0u;
    if (lane < gridDim.x) {
        uint2 its = __ldcg(best_of_blocks + lane);
        best = __uint_as_float(its.x), index = its.y;
    }
    best_of_warp(best, index);
    if (lane == 0) {
        arrived[sequence] = 0;
        if (index >= vocab) index = 0, *failed = 1;
        u32 position = positions[sequence] + 1;
        positions[sequence] = position;
        ids[sequence] = index;
        if (position < capacity) history[(u64)sequence * capacity + position] = index;
    }
}
