// attention: causal softmax(scale · q kᵀ) v within each sequence, grouped-query, optionally a sliding window
//   q    f16 [sequences · tokens, heads · D]
//   k, v f16 [sequences · tokens, kv_heads · D]
//   sinks f32 [heads], with SINKS: exp(sink) joins the denominator, unscaled
//   out  f16 [sequences · tokens, heads · D]
// Scores and probabilities never leave the chip: keys pass by in tiles of BC, and each row keeps its running maximum
// and sum (FlashAttention-2, arXiv 2307.08691, algorithm 1). Products are m16n8k16 f16 with F32 sums; probabilities
// are rounded to f16 for the second product, their sum is not; the output is rounded once.
// D % 16 == 0.  grid (ceil(tokens / (16 · WARPS)), heads, sequences), block 32 · WARPS, each warp 16 queries;
// dynamic shared memory 4 · BC · (D + 8) · 2 bytes: two tiles of keys and of values, one filling while one is used.
// Rows are padded by 16 bytes, so that the eight rows of a matrix load fall into different banks.
// Twin: backend/cpu.rs attention.

#define PITCH (D + 8)
#define ROWS (16 * WARPS)

__device__ __forceinline__ void load_matrices(u32 r[4], const u16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_matrices_transposed(u32 r[4], const u16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ __forceinline__ void multiply(float c[4], const u32 a[4], u32 b0, u32 b1) {
    multiply(c, a[0], a[1], a[2], a[3], b0, b1);
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts copying rows first .. first + BC of a head to shared memory; rows from `tokens` on are filled with zeros, since
// a probability of 0 times an unknown value could be NaN.
__device__ __forceinline__ void fetch_tile(u16 *tile, const f16 *from, u32 first, u32 tokens, u32 row_elements) {
#pragma unroll
    for (u32 at = threadIdx.x; at < BC * (D / 8); at += 32 * WARPS) {
        u32 row = at / (D / 8), column = at % (D / 8) * 8;
        u32 inside = first + row < tokens;
        const f16 *source = from + (u64)(inside ? first + row : 0) * row_elements + column;
        fetch<16>(tile + row * PITCH + column, source, inside);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
attention(const f16 *__restrict__ q, const f16 *__restrict__ k, const f16 *__restrict__ v,
          const float *__restrict__ sinks, f16 *__restrict__ out, u32 tokens, u32 heads, u32 kv_heads, u32 window,
          float scale) {
    extern __shared__ __align__(16) u16 shared[];
    u16 *key_tiles = shared, *value_tiles = shared + 2 * BC * PITCH;
    // The last queries see the most keys: start them first.
    u32 block_row = (gridDim.x - 1 - blockIdx.x) * ROWS;
    u32 head = blockIdx.y, lane = threadIdx.x % 32;
    u32 warp_row = block_row + threadIdx.x / 32 * 16;
    u64 sequence = (u64)blockIdx.z * tokens;
    u32 q_row = heads * D, kv_row = kv_heads * D;
    q += sequence * q_row + head * D;
    out += sequence * q_row + head * D;
    u32 kv_head = head / (heads / kv_heads);
    k += sequence * kv_row + kv_head * D;
    v += sequence * kv_row + kv_head * D;

    // This thread's two rows of every [16, *] fragment, and its first of two neighbouring columns.
    u32 rows[2] = {warp_row + lane / 4, warp_row + lane / 4 + 8};
    u32 pair = lane % 4 * 2;
    u32 query[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; step++)
#pragma unroll
        for (int part = 0; part < 4; part++) {
            u32 row = rows[part % 2];
            query[step][part] = row < tokens ? *(const u32 *)(q + (u64)row * q_row + step * 16 + part / 2 * 8 + pair) : 0;
        }

    float sum[2] = {0.0f, 0.0f}, largest[2] = {-INFINITY_F, -INFINITY_F};
    float o[D / 8][4] = {};
    float to_log2 = scale * 1.44269504f;

    u32 end = min(tokens, block_row + ROWS);
    u32 tile = (block_row >= window ? block_row - window + 1 : 0) / BC, tiles = (end + BC - 1) / BC;
    fetch_tile(key_tiles, k, tile * BC, tokens, kv_row);
    fetch_tile(value_tiles, v, tile * BC, tokens, kv_row);
    close_group();
    for (u32 stage = 0; tile < tiles; tile++, stage ^= 1) {
        wait_for_groups<0>();
        // Everyone's copies have landed, and everyone is done with the other stage.
        __syncthreads();
        if (tile + 1 < tiles) {
            fetch_tile(key_tiles + (stage ^ 1) * BC * PITCH, k, (tile + 1) * BC, tokens, kv_row);
            fetch_tile(value_tiles + (stage ^ 1) * BC * PITCH, v, (tile + 1) * BC, tokens, kv_row);
            close_group();
        }
        u32 first = tile * BC;
        if (first > warp_row + 15) continue; // above the diagonal for this warp
        const u16 *keys = key_tiles + stage * BC * PITCH, *values = value_tiles + stage * BC * PITCH;

        float s[BC / 8][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; step++)
#pragma unroll
            for (int n = 0; n < BC / 16; n++) {
                u32 b[4];
                load_matrices(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * PITCH + step * 16 + lane / 8 % 2 * 8);
                multiply(s[2 * n], query[step], b[0], b[1]);
                multiply(s[2 * n + 1], query[step], b[2], b[3]);
            }
        if (first + BC - 1 > warp_row || first + window <= warp_row + 15) {
#pragma unroll
            for (int n = 0; n < BC / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 column = first + n * 8 + pair + i % 2, row = rows[i / 2];
                    if (column > row || column + window <= row) s[n][i] = -INFINITY_F;
                }
        }
        float shift[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float tile_largest = largest[r];
#pragma unroll
            for (int n = 0; n < BC / 8; n++) tile_largest = fmaxf(tile_largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            tile_largest = fmaxf(tile_largest, __shfl_xor_sync(~0u, tile_largest, 1));
            tile_largest = fmaxf(tile_largest, __shfl_xor_sync(~0u, tile_largest, 2));
            // A row whose keys so far are all masked keeps -inf; shifting by 0 then gives exp2(-inf) = 0, not NaN.
            shift[r] = tile_largest == -INFINITY_F ? 0.0f : tile_largest * to_log2;
            float shrink = exp2_fast(largest[r] * to_log2 - shift[r]);
            largest[r] = tile_largest;
            sum[r] *= shrink;
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < BC / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = exp2_fast(s[n][i] * to_log2 - shift[i / 2]);
                sum[i / 2] += s[n][i];
            }
#pragma unroll
        for (int step = 0; step < BC / 16; step++) {
            u32 p[4] = {pack_f16(s[2 * step][0], s[2 * step][1]), pack_f16(s[2 * step][2], s[2 * step][3]),
                        pack_f16(s[2 * step + 1][0], s[2 * step + 1][1]),
                        pack_f16(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                load_matrices_transposed(
                    b, values + (step * 16 + lane / 8 % 2 * 8 + lane % 8) * PITCH + n * 16 + lane / 16 * 8);
                multiply(o[2 * n], p, b[0], b[1]);
                multiply(o[2 * n + 1], p, b[2], b[3]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
#if SINKS
        // Far above all scores this is infinite, and every probability 0.
        sum[r] += exp2_fast(sinks[head] * 1.44269504f - largest[r] * to_log2);
#endif
        float factor = 1.0f / sum[r];
        if (rows[r] < tokens)
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(u32 *)(out + (u64)rows[r] * q_row + n * 8 + pair) =
                    pack_f16(o[n][2 * r] * factor, o[n][2 * r + 1] * factor);
    }
}
