// matvec: y = x · wᵀ (+ bias) for a few tokens, reading packed weights once: the products of a decoding step
//   parts     up to three weights that read the same x, side by side: Weight, y, bias (f32 [rows] or null), rows, tiles
//   x         f16 [batch, cols]; with NORM f32 [1, cols], of which norm(x) · gain is multiplied, rounded to f16 once
//   gain      f32 [cols], for NORM
//   x_scales  f32 [batch] or null: what the products of each token are multiplied with
//   y         OUTPUT: F16 = rounded once, F32 = logits, ADD = y f32 +=, SWIGLU = f16 silu(part 0) · part 1
// A warp multiplies tiles of 16 rows with 8 tokens (m16n8k16, F32 sums). Codes multiply as exact f16 numbers, and each sum
// over the columns of a group is scaled after, in F32: scale · Σ code · x + offset · Σ x. Lane (g, t) holds rows g and
// g + 8 (SWIGLU: row g of both parts) and, of every piece of 128 columns, the four units that decode.cuh stores together;
// the order of columns inside a product does not matter as long as x has the same.
// A block takes ROW_TILES tiles at a time, every gridDim.x-th. Its WARPS warps take turns at pieces, and their sums are
// added at the end of a tile in a fixed order. Each warp keeps STAGES pieces on their way into its own part of shared
// memory (cp.async), across the ends of tiles. Weights do not depend on the kernel before, so the first pieces are asked
// for while that still runs.
// TOKENS is how many tokens a stage holds: 1, or 8 · TOKEN_TILES; 1 with NORM, where all of x stays in shared memory.
// needs cols % 8 == 0, batch <= TOKENS, ROW_TILES <= 2.
// grid up to the tiles of all parts, block 32 · WARPS, dynamic shared memory as backend/cuda/matvec.rs counts it.
// Twins: backend/cpu linear, rms_norm.

#define COLUMN_TOKENS (TOKENS == 1 ? 1 : 8) // of a tile's 8 that hold something

// Sums of a tile; two buffers save a barrier.
constexpr u32 TILE = 16 * COLUMN_TOKENS, SUMS = ROW_TILES * TOKEN_TILES * TILE;
constexpr u32 SUM_BUFFERS = SUMS <= 256 ? 2 : 1;

// Adds the products of a staged piece to the sums.
__device__ __forceinline__ void multiply_piece(const u8 *stage, const u8 *tokens, const Parts &parts, Place place, u32 lane,
                                               float total[ROW_TILES][TOKEN_TILES][4]) {
    u32 g = lane / 4, t = lane % 4;
    Codes codes = load_codes(stage, lane);
#if GROUPED
    // A lane works out the scales of the 32 columns from 32t on; the others get them from there.
    const int HALVES = GROUP == 16 ? 2 : 1;
    float2 grid[2 * ROW_TILES][HALVES];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++)
#pragma unroll
        for (int q = 0; q < HALVES; q++) grid[i][q] = staged_grid(stage, parts, place, 8 * i + g, 32 * t + 16 * q);
#endif
#pragma unroll
    for (int b = 0; b < 4; b++) {
        uint4 in[TOKEN_TILES];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            // A lone token fills all columns of its tile.
            u32 token = TOKENS == 1 ? 0 : n * 8 + g;
#if !PLAIN && GROUP == 16
            u32 segment = 4 * b + t / 2, byte = t % 2 * 8;
            uint2 low = *(const uint2 *)(tokens + segment_of(token, segment) + byte);
            uint2 high = *(const uint2 *)(tokens + segment_of(token, segment + 2) + byte);
            in[n] = make_uint4(low.x, low.y, high.x, high.y);
#else
            in[n] = *(const uint4 *)(tokens + segment_of(token, 4 * b + t));
#endif
        }
#if GROUPED && OFFSET != NONE
        // Σ x of the 32 columns, or of each 16 that share a scale, in the place of the sums: a product with ones.
        float x_sums[HALVES][TOKEN_TILES][4];
        const u32 ones = 0x3c003c00u;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            multiply_new(x_sums[0][n], ones, ones, ones, ones, in[n].x, in[n].y);
#if GROUP == 16
            multiply_new(x_sums[1][n], ones, ones, ones, ones, in[n].z, in[n].w);
#else
            multiply(x_sums[0][n], ones, ones, ones, ones, in[n].z, in[n].w);
#endif
        }
#endif
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            u32 a[4], c[4];
            unit_pairs(stage, codes, 2 * r, b, lane, a);
            unit_pairs(stage, codes, 2 * r + 1, b, lane, c);
#if GROUPED
            float2 own[HALVES][2];
#pragma unroll
            for (int q = 0; q < HALVES; q++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    own[q][half].x = __shfl_sync(~0u, grid[2 * r + half][q].x, (lane & 28) | b);
#if OFFSET != NONE
                    own[q][half].y = __shfl_sync(~0u, grid[2 * r + half][q].y, (lane & 28) | b);
#endif
                }
#endif
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
#if !GROUPED
                multiply(total[r][n], a[0], c[0], a[1], c[1], in[n].x, in[n].y);
                multiply(total[r][n], a[2], c[2], a[3], c[3], in[n].z, in[n].w);
#else
                float sum[4];
                multiply_new(sum, a[0], c[0], a[1], c[1], in[n].x, in[n].y);
                // Of a lone token one column is enough.
#if GROUP == 16
#pragma unroll
                for (int i = 0; i < 4; i += TOKENS == 1 ? 2 : 1) total[r][n][i] += own[0][i / 2].x * sum[i];
                multiply_new(sum, a[2], c[2], a[3], c[3], in[n].z, in[n].w);
#else
                multiply(sum, a[2], c[2], a[3], c[3], in[n].z, in[n].w);
#endif
#pragma unroll
                for (int i = 0; i < 4; i += TOKENS == 1 ? 2 : 1) {
                    total[r][n][i] += own[HALVES - 1][i / 2].x * sum[i];
#if OFFSET != NONE
#pragma unroll
                    for (int q = 0; q < HALVES; q++)
                        total[r][n][i] += own[q][i / 2].y * (x_sums[q][n][i] * (1.0f / UNPACKED));
#endif
                }
#endif
            }
        }
    }
}

// Adds the warps' sums of a tile and writes its results.
__device__ __forceinline__ void finish_tile(const float *sums, const Parts &parts, Place place, const float *x_scales, u32 batch) {
    const u32 STEP = OUTPUT == SWIGLU ? 2 : 1, ROWS = 16 / STEP;
    for (u32 at = threadIdx.x; at < SUMS / STEP; at += 32 * WARPS) {
        // Entries are [row tile][token tile][16 rows][tokens].
        u32 column = at % COLUMN_TOKENS, row_in_tile = at / COLUMN_TOKENS % ROWS;
        u32 n = at / (COLUMN_TOKENS * ROWS) % TOKEN_TILES, r = at / (COLUMN_TOKENS * ROWS * TOKEN_TILES);
        u32 token = n * 8 + column, row = (place.tile * ROW_TILES + r) * ROWS + row_in_tile;
        u32 rows = parts.rows[place.part];
        if (row >= rows || token >= batch) continue;
        float values[STEP];
#pragma unroll
        for (u32 s = 0; s < STEP; s++) {
            u32 which = OUTPUT == SWIGLU ? s : place.part;
            u32 entry = (r * TOKEN_TILES + n) * TILE + (row_in_tile + 8 * s) * COLUMN_TOKENS + column;
            float value = 0.0f;
#pragma unroll
            for (u32 warp = 0; warp < WARPS; warp++) value += sums[warp * SUMS + entry];
            value *= UNPACKED;
#if !DENSE && !GROUPED
            value *= grid_at(parts.w[which], row, 0).x;
#endif
            if (x_scales) value *= x_scales[token];
            if (parts.bias[which]) value += parts.bias[which][row];
            values[s] = value;
        }
        u64 to = (u64)token * rows + row;
#if OUTPUT == SWIGLU
        store((f16 *)parts.y[0] + to, values[0] / (1.0f + __expf(-values[0])) * values[1]);
#elif OUTPUT == ADD
        ((float *)parts.y[place.part])[to] += values[0];
#elif OUTPUT == F32
        ((float *)parts.y[place.part])[to] = values[0];
#else
        store((f16 *)parts.y[place.part] + to, values[0]);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
matvec(const __grid_constant__ Parts parts, const void *__restrict__ x, const float *__restrict__ gain,
       const float *__restrict__ x_scales, u32 batch, float eps) {
    extern __shared__ __align__(16) u8 shared[];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 cols = parts.w[0].cols, pieces = (cols + PIECE - 1) / PIECE, tiles = parts.last_tile[2];
    u8 *ring = shared + warp * STAGES * STAGE_BYTES;
    float *sums = (float *)(shared + WARPS * STAGES * STAGE_BYTES);
    let_successor_start();

    // What this warp fetches next; a warp without pieces fetches nothing.
    const u32 pitch = parts.w[0].pitch;
    u32 next_tile = warp < pieces ? blockIdx.x : tiles, next_piece = warp;
    Rows next_rows = rows_of(parts, place_of(parts, blockIdx.x), lane);
    auto fetch_next = [&](u8 *stage) {
        fetch_codes(stage, next_rows, pitch, next_piece, lane);
        next_piece += WARPS;
        if (next_piece < pieces) return;
        next_piece = warp, next_tile += gridDim.x;
        if (next_tile < tiles) next_rows = rows_of(parts, place_of(parts, next_tile), lane);
    };
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (next_tile < tiles) fetch_next(ring + s * STAGE_BYTES);
        close_group();
    }
#if NORM
    u8 *normed = (u8 *)(sums + SUM_BUFFERS * WARPS * SUMS);
    // Gains do not depend on the kernel before either.
    float first_gain[8] = {};
    if (8 * threadIdx.x < cols) load8(gain + 8 * threadIdx.x, first_gain);
    for (u32 c = 256 * WARPS + 32 * threadIdx.x; c < cols; c += 1024 * WARPS)
        asm volatile("prefetch.global.L2 [%0];" :: "l"(gain + c));
    wait_for_predecessor();
    norm_to_shared((const float *)x, gain, first_gain, (f16 *)normed, cols, pieces, eps);
    __syncthreads();
#else
    wait_for_predecessor();
    u32 first_piece = warp, first_tile = warp < pieces ? blockIdx.x : tiles;
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (first_tile < tiles)
            fetch_tokens(ring + s * STAGE_BYTES, (const f16 *)x, cols, batch, first_piece, lane);
        close_group();
        first_piece += WARPS;
        if (first_piece >= pieces) first_piece = warp, first_tile += gridDim.x;
    }
#endif

    u32 slot = 0, buffer = 0;
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        Place place = place_of(parts, tile);
        float total[ROW_TILES][TOKEN_TILES][4] = {};
        for (u32 piece = warp; piece < pieces; piece += WARPS) {
            u8 *stage = ring + slot * STAGE_BYTES;
            wait_for_groups<STAGES - 1>();
            __syncwarp();
#if NORM
            multiply_piece(stage, normed + piece * 2 * PIECE, parts, place, lane, total);
#else
            multiply_piece(stage, stage + STAGE_TOKENS, parts, place, lane, total);
#endif
            __syncwarp();
            if (next_tile < tiles) {
#if !NORM
                fetch_tokens(stage, (const f16 *)x, cols, batch, next_piece, lane);
#endif
                fetch_next(stage);
            }
            close_group();
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
        float *own = sums + buffer * WARPS * SUMS;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (TOKENS > 1 || (t == 0 && i % 2 == 0))
                        own[warp * SUMS + (r * TOKEN_TILES + n) * TILE + (g + 8 * (i / 2)) * COLUMN_TOKENS + 2 * t + i % 2] =
                            total[r][n][i];
        __syncthreads();
        finish_tile(own, parts, place, x_scales, batch);
        if (SUM_BUFFERS == 1) __syncthreads();
        else buffer ^= 1;
    }
}
