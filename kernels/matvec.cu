// matvec: y = x · wᵀ (+ bias) for a few tokens, reading packed weights once: the products of a decoding step
//   parts  up to three weights that read the same x, side by side: Weight, y, bias (f32 [rows] or null), rows, blocks
//   x      bf16 [batch, cols]
//   y      OUTPUT: BF16 = rounded once, F32 = logits, ADD = y f32 +=, SWIGLU = bf16 silu(part 0) · part 1
// A warp multiplies tiles of 16 rows with 8 tokens (m16n8k16, F32 sums). Lane (g, t) holds rows g and g + 8 and, of every
// 32 columns, the unit of 8 from 8t on: the order of columns inside a product does not matter as long as x has the same,
// so a lane reads whole words of codes and 16 bytes of x. Where 32 columns share a scale, codes are multiplied as exact
// bf16 numbers and scaled after, in F32: scale · Σ code · x + offset · Σ x. Other weights are decoded and rounded first.
// WARPS warps of a block share its ROW_TILES · 16 rows and take turns at pieces of 64 columns; their sums are added at the
// end in a fixed order.
// UNROLL pieces are asked for before the first is used: memory is far, and a lane's words are small.
// needs cols % 64 == 0, batch <= 8 · TOKEN_TILES, WARPS · ROW_TILES · TOKEN_TILES <= 64; SWIGLU: ROW_TILES even, tiles of part 0 and 1
// alternate.  grid: all parts' blocks, block 32 · WARPS.
// Twin: backend/cpu linear.

#define BF16 0
#define F32 1
#define ADD 2
#define SWIGLU 3
#define DENSE (ELEMENT == DENSE_BF16)
#if ELEMENT == DENSE_BF16 || ELEMENT == DENSE_F16 || ELEMENT == DENSE_F32
#define BITS 16 // of a row's first bytes, for prefetching
#endif
// Codes are exact in bf16 and 32 columns have one scale.
#define FACTORED (!DENSE && ELEMENT != DENSE_F16 && ELEMENT != DENSE_F32 && ELEMENT != E4M3 && \
                  (GROUP == ROW || GROUP == 32 || GROUP == 64 || GROUP == 128 || GROUP == 256))

struct Parts {
    Weight w[3];
    u64 y[3];
    const float *bias[3];
    u32 rows[3];
    u32 last_block[3]; // one past
};

__device__ __forceinline__ void multiply(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Loads that stay where they are written: left to itself the compiler moves each down to its use and waits there.
__device__ __forceinline__ u32 load_now(const u32 *from) {
    u32 x;
    asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
__device__ __forceinline__ uint2 load_now(const uint2 *from) {
    uint2 x;
    asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from));
    return x;
}
__device__ __forceinline__ uint4 load_now(const uint4 *from) {
    uint4 x;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

// The stored codes of a unit, and these as bf16 pairs (0, 1), (2, 3), (4, 5), (6, 7).
#if FACTORED
struct Codes {
    u32 low, high;
};
__device__ __forceinline__ Codes load_codes(const Weight &w, u32 unit) {
    Codes codes;
#if BITS > 6
    uint2 words = load_now((const uint2 *)w.low + unit);
    codes.low = words.x, codes.high = words.y;
#else
    codes.low = load_now((const u32 *)w.low + unit);
#if BITS == 5
    codes.high = w.high[unit];
#elif BITS == 6
    codes.high = ((const u16 *)w.high)[unit];
#endif
#endif
    return codes;
}
__device__ __forceinline__ void unpack(const Codes &codes, u32 p[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if BITS > 6
        u32 word = (j < 2 ? codes.low : codes.high) ^ (ELEMENT == INT ? 0x80808080u : 0);
        // Bytes become 2^23 + u, the difference is exact, and its upper half is the bf16.
        float base = 8388608.0f + (ELEMENT == INT ? 128.0f : 0.0f);
        float a = __uint_as_float(__byte_perm(word, 0x4b000000, j % 2 ? 0x7442 : 0x7440)) - base;
        float b = __uint_as_float(__byte_perm(word, 0x4b000000, j % 2 ? 0x7443 : 0x7441)) - base;
        p[j] = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
#elif ELEMENT == E2M1
        // Sign and fields in place give the value · 2^-126; ½ is a subnormal there, which bf16 products keep.
        u32 top = codes.low << (12 - 4 * j);
        p[j] = fma_pair((top & 0x80008000u) | (top >> 6 & 0x01c001c0u), 0x7e807e80u, 0x80008000u);
#else
        // 128 + v is a bf16 for v < 128.
        u32 v = (codes.low >> (4 * j) & 0x000f000fu) | 0x43004300u;
#if BITS == 5
        v |= (codes.high >> (2 * j) & 1) << 4 | (codes.high >> (2 * j + 1) & 1) << 20;
#elif BITS == 6
        v |= (codes.high >> (4 * j) & 3) << 4 | (codes.high >> (4 * j + 2) & 3) << 20;
#endif
        const u32 base = 128 + (ELEMENT == INT ? 1 << (BITS - 1) : 0); // up to 160: even, so a bf16
        p[j] = fma_pair(v, 0x3f803f80u, (0xc300u + (base - 128)) * 0x10001u);
#endif
    }
}
#else
struct Codes {
    u32 pairs[4];
};
__device__ __forceinline__ Codes load_codes(const Weight &w, u32 unit) {
    Codes codes;
#if DENSE
    uint4 words = load_now((const uint4 *)w.low + unit);
    codes.pairs[0] = words.x, codes.pairs[1] = words.y, codes.pairs[2] = words.z, codes.pairs[3] = words.w;
#else
    float x[8];
    decode_unit(w, unit, x);
    for (int j = 0; j < 4; j++) codes.pairs[j] = pack_bf16(x[2 * j], x[2 * j + 1]);
#endif
    return codes;
}
__device__ __forceinline__ void unpack(const Codes &codes, u32 p[4]) {
    for (int j = 0; j < 4; j++) p[j] = codes.pairs[j];
}
#endif

#if FACTORED
// Returns the effective scale and offset of the group that flat element i is in.
__device__ __forceinline__ float2 grid_at(const Weight &w, u32 i) {
    u32 group = group_of<GROUP>(i, w.cols);
    float scale = stored<SCALE>(w.scales, group), offset = 0.0f;
#if OUTER != NONE
    u32 outer = group_of<OUTER_GROUP>(i, w.cols);
    scale = __fmul_rn(stored<OUTER>(w.outer, outer), scale);
#endif
#if OFFSET == ADDED
    offset = stored<OFFSET_CODEC>(w.offsets, group);
#elif OFFSET == SUBTRACTED
    offset = -__fmul_rn(stored<OUTER>(w.outer_offsets, outer), stored<OFFSET_CODEC>(w.offsets, group));
#endif
    return make_float2(scale, offset);
}
#endif

// Adds the products of N pieces of 64 columns, one block's stride apart, to the sums.
template <int N>
__device__ __forceinline__ void take(const Parts &parts, u32 part, const u32 starts[ROW_TILES][2],
                                     const bf16 *const tokens[TOKEN_TILES], u32 column,
                                     float total[ROW_TILES][TOKEN_TILES][4]) {
    Codes codes[2 * N][ROW_TILES][2];
    uint4 x[2 * N][TOKEN_TILES];
#if FACTORED && GROUP != ROW
    float2 grids[2 * N][ROW_TILES][2];
#endif
#pragma unroll
    for (int piece = 0; piece < 2 * N; piece++) {
        u32 at = column + 64 * WARPS * (piece / 2) + 32 * (piece % 2);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Weight &w = parts.w[OUTPUT == SWIGLU ? r % 2 : part];
                codes[piece][r][half] = load_codes(w, (starts[r][half] + at) / 8);
#if FACTORED && GROUP != ROW
                grids[piece][r][half] = grid_at(w, starts[r][half] + at);
#endif
            }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) x[piece][n] = *(const uint4 *)(tokens[n] + at);
    }
    // No load moves down past this: left to itself the assembler puts each right before its use and waits there.
    __syncwarp();
#pragma unroll
    for (int piece = 0; piece < 2 * N; piece++) {
        const uint4 *b = x[piece];
#if FACTORED && OFFSET != NONE
        // Σ x of the 32 columns, in the place of the sums: a product with ones.
        float x_sums[TOKEN_TILES][4] = {};
        const u32 ones = 0x3f803f80u;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            multiply(x_sums[n], ones, ones, ones, ones, b[n].x, b[n].y);
            multiply(x_sums[n], ones, ones, ones, ones, b[n].z, b[n].w);
        }
#endif
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            u32 a[4], c[4];
            unpack(codes[piece][r][0], a);
            unpack(codes[piece][r][1], c);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++) {
#if FACTORED && GROUP != ROW
                float s[4] = {};
                multiply(s, a[0], c[0], a[1], c[1], b[n].x, b[n].y);
                multiply(s, a[2], c[2], a[3], c[3], b[n].z, b[n].w);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    total[r][n][i] += grids[piece][r][i / 2].x * s[i];
#if OFFSET != NONE
                    total[r][n][i] += grids[piece][r][i / 2].y * x_sums[n][i];
#endif
                }
#else
                multiply(total[r][n], a[0], c[0], a[1], c[1], b[n].x, b[n].y);
                multiply(total[r][n], a[2], c[2], a[3], c[3], b[n].z, b[n].w);
#endif
            }
        }
    }
}

// Asks for the first bytes of each of the block's rows, which do not depend on the kernel before, while that still runs.
__device__ __forceinline__ void prefetch(const Parts &parts, u32 part, u32 block, u32 rows) {
    const u32 LINES = 8;
    u32 row_bytes = parts.w[0].cols / 8 * (DENSE ? 16 : BITS > 6 ? 8 : 4);
    for (u32 at = threadIdx.x; at < ROW_TILES * 16 * LINES; at += 32 * WARPS) {
        u32 tile = at / (16 * LINES), row_in_tile = at / LINES % 16, byte = at % LINES * 128;
        u32 row = (OUTPUT == SWIGLU ? block * (ROW_TILES / 2) + tile / 2 : block * ROW_TILES + tile) * 16 + row_in_tile;
        const u8 *line = parts.w[OUTPUT == SWIGLU ? tile % 2 : part].low + (u64)row * row_bytes + byte;
        if (row < rows && byte < row_bytes) asm volatile("prefetch.global.L2 [%0];" :: "l"(line));
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
matvec(const __grid_constant__ Parts parts, const bf16 *__restrict__ x, u32 batch) {
    __shared__ float sums[WARPS][ROW_TILES * TOKEN_TILES * 128];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 part = 0, block = blockIdx.x;
#if OUTPUT != SWIGLU
    while (block >= parts.last_block[part]) part++;
    if (part > 0) block -= parts.last_block[part - 1];
#endif
    u32 cols = parts.w[0].cols;
    u32 rows = parts.rows[part];
    // Flat index of this lane's first column, for its two rows of each tile; rows past the end read the last one.
    u32 starts[ROW_TILES][2];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 tile = OUTPUT == SWIGLU ? block * (ROW_TILES / 2) + r / 2 : block * ROW_TILES + r;
            starts[r][half] = min(tile * 16 + g + 8 * half, rows - 1) * cols + 8 * t;
        }
    const bf16 *tokens[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) tokens[n] = x + (u64)min(n * 8 + g, batch - 1) * cols + 8 * t;

    let_successor_start();
    prefetch(parts, part, block, rows);
    wait_for_predecessor();
    float total[ROW_TILES][TOKEN_TILES][4] = {};
    u32 column = 64 * warp;
    for (; column + 64 * WARPS * (UNROLL - 1) < cols; column += 64 * WARPS * UNROLL)
        take<UNROLL>(parts, part, starts, tokens, column, total);
    for (; column < cols; column += 64 * WARPS) take<1>(parts, part, starts, tokens, column, total);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[warp][(r * TOKEN_TILES + n) * 128 + (g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = total[r][n][i];
    __syncthreads();
    // A thread finishes (tile, row, token) entries: 16 rows by 8 tokens a tile.
    const int STEP = OUTPUT == SWIGLU ? 2 : 1;
    for (u32 at = threadIdx.x; at < ROW_TILES / STEP * TOKEN_TILES * 128; at += 32 * WARPS) {
        u32 tile = at / (TOKEN_TILES * 128), rest = at % (TOKEN_TILES * 128);
        u32 token = rest / 128 * 8 + rest % 8, row_in_tile = rest % 128 / 8;
        u32 row = (block * (ROW_TILES / STEP) + tile) * 16 + row_in_tile;
        if (row >= rows || token >= batch) continue;
        float values[STEP];
#pragma unroll
        for (int s = 0; s < STEP; s++) {
            u32 which = OUTPUT == SWIGLU ? s : part;
            float value = 0.0f;
            for (int from = 0; from < WARPS; from++) value += sums[from][(tile * STEP + s) * TOKEN_TILES * 128 + rest];
#if FACTORED && GROUP == ROW
            value *= grid_at(parts.w[which], row * cols).x;
#endif
            if (parts.bias[which]) value += parts.bias[which][row];
            values[s] = value;
        }
        u64 to = (u64)token * rows + row;
#if OUTPUT == SWIGLU
        store((bf16 *)parts.y[0] + to, values[0] / (1.0f + __expf(-values[0])) * values[1]);
#elif OUTPUT == ADD
        ((float *)parts.y[part])[to] += values[0];
#elif OUTPUT == F32
        ((float *)parts.y[part])[to] = values[0];
#else
        store((bf16 *)parts.y[part] + to, values[0]);
#endif
    }
}
