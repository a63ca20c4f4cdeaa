// advance: ends a decoding step: picks the most likely token, records it, and moves the sequence on
//   logits     f32 [batch, vocab]
//   ids        u32 [batch]             the token to embed next; written
//   positions  u32 [batch]             incremented
//   history    u32 [batch, capacity]   history[i, positions[i]] = the token fed at that position; written for the next
// The lowest index wins ties.  grid batch, block 1024.
// Twin: the top of score.cu.
extern "C" __global__ void __launch_bounds__(1024)
advance(const float *__restrict__ logits, u32 *__restrict__ ids, u32 *__restrict__ positions,
        u32 *__restrict__ history, u32 vocab, u32 capacity) {
    __shared__ float values[32];
    __shared__ u32 indices[32];
    let_successor_start();
    wait_for_predecessor();
    logits += (u64)blockIdx.x * vocab;
    float best = -INFINITY_F;
    u32 index = ~0u;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < vocab; i += 1024) {
        float x = logits[i];
        if (x > best) best = x, index = i;
    }
    for (int round = 0; round < 2; round++) {
        for (int lane = 16; lane > 0; lane /= 2) {
            float other = __shfl_xor_sync(~0u, best, lane);
            u32 other_index = __shfl_xor_sync(~0u, index, lane);
            if (other > best || (other == best && other_index < index)) best = other, index = other_index;
        }
        if (round == 1) break;
        if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = best, indices[threadIdx.x / 32] = index;
        __syncthreads();
        best = values[threadIdx.x % 32], index = indices[threadIdx.x % 32];
    }
    if (threadIdx.x == 0) {
        u32 position = positions[blockIdx.x] + 1;
        positions[blockIdx.x] = position;
        ids[blockIdx.x] = index;
        if (position < capacity) history[(u64)blockIdx.x * capacity + position] = index;
    }
}
