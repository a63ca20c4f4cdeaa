// attend_cached: softmax(scale · q kᵀ) v of one new query a sequence over its cached positions
//   q                 bf16 [batch, heads · D]
//   k_cache, v_cache  bf16 [batch, capacity, kv_heads · D]
//   positions         u32 [batch]     the query's own position; it sees 0 ..= position, at most `window` of them
//   out               bf16 [batch, heads · D]
// Eight lanes share a key, so a warp takes four keys at a time and a block of 8 warps 32; a lane holds D / 8 columns of
// HEADS queries that read the same keys. Everything is F32 from bf16 inputs, rounded once.
// D % 64 == 0, HEADS divides heads / kv_heads.  grid (heads / HEADS, batch), block 256.
// Twin: attention.cu for the last position.
#define COLUMNS (D / 8)
#define SLOTS 32

extern "C" __global__ void __launch_bounds__(256)
attend_cached(const bf16 *__restrict__ q, const bf16 *__restrict__ k_cache, const bf16 *__restrict__ v_cache,
              const u32 *__restrict__ positions, bf16 *__restrict__ out, u32 heads, u32 kv_heads, u32 capacity, u32 window,
              float scale) {
    __shared__ float parts[8][HEADS][D], largest_of[8][HEADS], sum_of[8][HEADS];
    let_successor_start();
    wait_for_predecessor();
    u32 first_head = blockIdx.x * HEADS, sequence = blockIdx.y, kv_head = first_head / (heads / kv_heads);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, slot = lane / 8, column = lane % 8 * 8;
    u32 position = positions[sequence], row = kv_heads * D;
    u64 start = (u64)sequence * capacity * row + kv_head * D;
    k_cache += start;
    v_cache += start;
    q += ((u64)sequence * heads + first_head) * D;
    // This lane's columns: 8 from `column` on of every 64.
    float query[HEADS][COLUMNS], o[HEADS][COLUMNS] = {}, largest[HEADS], sum[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 8) load8(q + h * D + c * 8 + column, query[h] + c);
        largest[h] = -INFINITY_F;
        sum[h] = 0.0f;
    }
    u32 first = position + 1 > window ? position + 1 - window : 0;
    for (u32 base = first; base <= position; base += SLOTS) {
        u32 key = base + warp * 4 + slot;
        bool inside = key <= position;
        u64 at = (u64)(inside ? key : position) * row + column;
        float k[COLUMNS], v[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 8) load8(k_cache + at + c * 8, k + c), load8(v_cache + at + c * 8, v + c);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = 0.0f;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) score += query[h][c] * k[c];
            score += __shfl_xor_sync(~0u, score, 1);
            score += __shfl_xor_sync(~0u, score, 2);
            score += __shfl_xor_sync(~0u, score, 4);
            score = inside ? score * scale : -INFINITY_F;
            float new_largest = fmaxf(largest[h], score);
            float shift = new_largest == -INFINITY_F ? 0.0f : new_largest;
            float shrink = expf(largest[h] - shift), p = expf(score - shift);
            largest[h] = new_largest;
            sum[h] = sum[h] * shrink + p;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) o[h][c] = o[h][c] * shrink + p * v[c];
        }
    }
    // Merge the four keys of a warp, then the warps.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float most = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 8));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
        float factor = largest[h] == -INFINITY_F ? 0.0f : expf(largest[h] - most);
        sum[h] *= factor;
        sum[h] += __shfl_xor_sync(~0u, sum[h], 8);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 16);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            o[h][c] *= factor;
            o[h][c] += __shfl_xor_sync(~0u, o[h][c], 8);
            o[h][c] += __shfl_xor_sync(~0u, o[h][c], 16);
            if (slot == 0) parts[warp][h][c / 8 * 64 + column + c % 8] = o[h][c];
        }
        if (lane == 0) largest_of[warp][h] = most, sum_of[warp][h] = sum[h];
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < HEADS * D; at += 256) {
        u32 h = at / D, c = at % D;
        float most = -INFINITY_F, total = 0.0f, value = 0.0f;
        for (int w = 0; w < 8; w++) most = fmaxf(most, largest_of[w][h]);
        for (int w = 0; w < 8; w++) {
            float factor = largest_of[w][h] == -INFINITY_F ? 0.0f : expf(largest_of[w][h] - most);
            total += factor * sum_of[w][h];
            value += factor * parts[w][h][c];
        }
        store(out + ((u64)sequence * heads + first_head + h) * D + c, value / total);
    }
}
