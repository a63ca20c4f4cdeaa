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

#define F16 0
#define F32 1
#define ADD 2
#define SWIGLU 3

#define PIECE 128
#define UNIT_BYTES (ELEMENT == DENSE_F32 ? 32 : DENSE ? 16 : BITS > 6 ? 8 : 4)
// 16-byte slices of a lane's four units of a row.
#define SLICES (UNIT_BYTES / 4)
#define HIGH_BYTES (BITS == 5 ? 4 : BITS == 6 ? 8 : 0)
// Scales are per group of columns, so staged and applied per group; others at the end.
#define GROUPED (!DENSE && GROUP > 0)
#define COLUMN_TOKENS (TOKENS == 1 ? 1 : 8) // of a tile's 8 that hold something

struct Parts {
    Weight w[3];
    u64 y[3];
    const float *bias[3];
    u32 rows[3];
    u32 last_tile[3]; // one past
};

// Bytes of a plane's entries for a row and piece, and what is fetched of them: at least a word, which holds the entry.
template <int CODEC> __device__ constexpr u32 codec_bytes() {
    return CODEC == CODEC_F32 ? 4 : CODEC == CODEC_F16 || CODEC == CODEC_BF16 ? 2 : 1;
}
#if GROUPED
constexpr u32 ENTRIES = entries_of<GROUP>();
constexpr u32 SCALE_BYTES = ENTRIES * codec_bytes<SCALE>() < 4 ? 4 : ENTRIES * codec_bytes<SCALE>();
constexpr u32 OFFSET_BYTES = OFFSET == NONE ? 0 : ENTRIES * codec_bytes<OFFSET_CODEC>();
constexpr u32 OUTER_BYTES = OUTER != NONE && OUTER_GROUP > 0 ? 4 : 0;
constexpr u32 GRID_BYTES = SCALE_BYTES + OFFSET_BYTES + OUTER_BYTES * (OFFSET == SUBTRACTED ? 2 : 1);
#else
constexpr u32 GRID_BYTES = 0;
#endif
constexpr u32 STAGE_HIGH = ROW_TILES * 2 * 512 * SLICES;
constexpr u32 STAGE_GRID = STAGE_HIGH + ROW_TILES * 2 * 32 * HIGH_BYTES;
constexpr u32 STAGE_TOKENS = STAGE_GRID + ROW_TILES * 16 * GRID_BYTES;
constexpr u32 STAGE_BYTES = STAGE_TOKENS + (NORM ? 0 : TOKENS * 2 * PIECE);
// Sums of a tile; two buffers save a barrier.
constexpr u32 TILE = 16 * COLUMN_TOKENS, SUMS = ROW_TILES * TOKEN_TILES * TILE;
constexpr u32 SUM_BUFFERS = SUMS <= 256 ? 2 : 1;

__device__ __forceinline__ void multiply(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same from zero: c = a · b.
__device__ __forceinline__ void multiply_new(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %10, %10, %10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Starts copying BYTES bytes to shared memory, zeros where not `inside`.
template <int BYTES> __device__ __forceinline__ void fetch(void *to, const void *from, bool inside) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(inside ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

// A tile's part, and the part's own tile.
struct Place {
    u32 part, tile;
};
__device__ __forceinline__ Place place_of(const Parts &parts, u32 tile) {
    Place place = {0, tile};
#if OUTPUT != SWIGLU
    while (tile >= parts.last_tile[place.part]) place.part++;
    if (place.part > 0) place.tile -= parts.last_tile[place.part - 1];
#endif
    return place;
}

// Which weight and row, slot `slot` of a tile's 16 · ROW_TILES is; rows past the last are copies of that.
struct Row {
    const Weight *w;
    u32 row;
};
__device__ __forceinline__ Row row_of(const Parts &parts, Place place, u32 slot) {
#if OUTPUT == SWIGLU
    u32 row = place.tile * (8 * ROW_TILES) + slot / 16 * 8 + slot % 8;
    return {&parts.w[slot / 8 % 2], min(row, parts.rows[0] - 1)};
#else
    return {&parts.w[place.part], min(place.tile * (16 * ROW_TILES) + slot, parts.rows[place.part] - 1)};
#endif
}

// What a lane fetches of a tile: its rows' codes, and the scales of one slot.
struct Rows {
    const u8 *low[2 * ROW_TILES];
#if HIGH_BYTES > 0
    const u8 *high[2 * ROW_TILES];
#endif
#if GROUPED
    const u8 *scales;
    const u8 *offsets;
    u32 entry; // of the slot's row in its plane of scales
    const u8 *outer, *outer_offsets;
    u32 outer_entry;
#endif
};

__device__ __forceinline__ Rows rows_of(const Parts &parts, Place place, u32 lane) {
    const u32 pitch = parts.w[0].pitch;
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        Row at = row_of(parts, place, 8 * i + lane / 4);
        u64 unit = (u64)at.row * (pitch / 8) + (PLAIN ? 1 : BITS > 6 ? 2 : 4) * (lane % 4);
        rows.low[i] = at.w->low + unit * UNIT_BYTES;
#if HIGH_BYTES > 0
        rows.high[i] = at.w->high + unit / 4 * HIGH_BYTES;
#endif
    }
#if GROUPED
    Row at = row_of(parts, place, lane % (16 * ROW_TILES));
    rows.scales = at.w->scales, rows.offsets = at.w->offsets, rows.entry = group_of<GROUP>(at.row, 0, pitch);
#if OUTER != NONE && OUTER_GROUP > 0
    rows.outer = at.w->outer, rows.outer_offsets = at.w->outer_offsets;
    rows.outer_entry = group_of<OUTER_GROUP>(at.row, 0, pitch);
#endif
#endif
    return rows;
}

__device__ __forceinline__ void fetch_codes(u8 *stage, const Rows &rows, u32 pitch, u32 piece, u32 lane) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        u8 *to = stage + i * 512 * SLICES + lane * 16;
        const u8 *from = rows.low[i] + piece * (16 * UNIT_BYTES);
#if PLAIN
        // Units in column order: unit b of this lane is 4b + t of the piece.
#pragma unroll
        for (int b = 0; b < 4; b++) {
            bool inside = 8 * (piece * 16 + 4 * b + lane % 4) < pitch;
            const u8 *unit = inside ? from + 4 * b * UNIT_BYTES : rows.low[i];
#if UNIT_BYTES == 8
            fetch<8>(to + b / 2 * 512 + b % 2 * 8, unit, inside);
#else
#pragma unroll
            for (int k = 0; k < UNIT_BYTES / 16; k++)
                fetch<16>(to + (b * (UNIT_BYTES / 16) + k) * 512, unit + 16 * k, inside);
#endif
        }
#else
#pragma unroll
        for (int k = 0; k < SLICES; k++) fetch<16>(to + k * 512, from + 64 * k, true);
#if HIGH_BYTES > 0
        fetch<HIGH_BYTES>(stage + STAGE_HIGH + (i * 32 + lane) * HIGH_BYTES, rows.high[i] + piece * (4 * HIGH_BYTES), true);
#endif
#endif
    }
#if GROUPED
    if (ROW_TILES == 2 || lane < 16) {
        u8 *to = stage + STAGE_GRID + lane * SCALE_BYTES;
        u32 entry = rows.entry + piece * PIECE / covered_by<GROUP>() * (8 * ENTRIES);
        fetch<SCALE_BYTES>(to, rows.scales + (entry * codec_bytes<SCALE>() & ~3u), true);
        to = stage + STAGE_GRID + 16 * ROW_TILES * SCALE_BYTES;
#if OFFSET != NONE
        fetch<OFFSET_BYTES>(to + lane * OFFSET_BYTES, rows.offsets + entry * codec_bytes<OFFSET_CODEC>(), true);
        to += 16 * ROW_TILES * OFFSET_BYTES;
#endif
#if OUTER != NONE && OUTER_GROUP > 0
        u32 word = (rows.outer_entry + piece * PIECE / covered_by<OUTER_GROUP>() * 8) * codec_bytes<OUTER>() & ~3u;
        fetch<4>(to + lane * 4, rows.outer + word, true);
#if OFFSET == SUBTRACTED
        fetch<4>(to + (16 * ROW_TILES + lane) * 4, rows.outer_offsets + word, true);
#endif
#endif
    }
#endif
}

#if GROUPED
// Returns scale and offset of a slot at a column of its piece, from its stage.
__device__ __forceinline__ float2 staged_grid(const u8 *stage, const Parts &parts, Place place, u32 slot, u32 column) {
    Row at = row_of(parts, place, slot);
    const u8 *from = stage + STAGE_GRID + slot * SCALE_BYTES;
    u32 entry = column / GROUP;
    // A word holds the entries of neighbouring rows where it is larger than one row's.
    if (ENTRIES * codec_bytes<SCALE>() < 4) entry += at.row % (4 / codec_bytes<SCALE>());
#if SCALE == CODEC_E8M0
    // 2^-127, a subnormal, for byte 0; infinite instead of NaN for 255.
    float scale = __uint_as_float(max((u32)from[entry] << 23, 0x00400000u));
#else
    float scale = stored<SCALE>(from, entry);
#endif
    float offset = 0.0f;
    from = stage + STAGE_GRID + 16 * ROW_TILES * SCALE_BYTES;
#if OFFSET != NONE
    offset = stored<OFFSET_CODEC>(from + slot * OFFSET_BYTES, column / GROUP);
    from += 16 * ROW_TILES * OFFSET_BYTES;
#endif
#if OUTER != NONE && OUTER_GROUP > 0
    u32 outer = at.row % (4 / codec_bytes<OUTER>());
    scale *= stored<OUTER>(from + slot * 4, outer);
#if OFFSET == SUBTRACTED
    offset *= -stored<OUTER>(from + (16 * ROW_TILES + slot) * 4, outer);
#endif
#elif OUTER != NONE
    scale *= stored<OUTER>(at.w->outer, 0);
#endif
    return make_float2(scale, offset);
}
#endif

// 16-byte segments of odd tokens trade places, so that the lanes of a load fall into different banks.
__device__ __forceinline__ u32 segment_of(u32 token, u32 segment) {
    return token * 2 * PIECE + (segment ^ (token % 2 * 4)) * 16;
}

#if !NORM
__device__ __forceinline__ void fetch_tokens(u8 *stage, const f16 *x, u32 cols, u32 batch, u32 piece, u32 lane) {
#pragma unroll
    for (u32 i = lane; i < TOKENS * 16; i += 32) {
        u32 token = i / 16, column = piece * PIECE + i % 16 * 8;
        bool inside = column < cols && token < batch;
        fetch<16>(stage + STAGE_TOKENS + segment_of(token, i % 16), x + (inside ? (u64)token * cols + column : 0), inside);
    }
}
#else
// Writes norm(x) · gain to shared memory, zeros past its end. A thread's first eight columns stay in registers; `first_gain`
// has their gains.
__device__ __forceinline__ void norm_to_shared(const float *x, const float *gain, const float first_gain[8], f16 *to,
                                               u32 cols, u32 pieces, float eps) {
    __shared__ float scratch[32];
    const u32 own = 8 * threadIdx.x, step = 256 * WARPS;
    float sum = 0.0f, first[8] = {}, a[8], g[8];
    if (own < cols) load8(x + own, first);
    for (int j = 0; j < 8; j++) sum += first[j] * first[j];
    for (u32 c = own + step; c < cols; c += step) {
        load8(x + c, a);
        for (int j = 0; j < 8; j++) sum += a[j] * a[j];
    }
    float factor = 1.0f / sqrtf(block_sum(sum, scratch) / (float)cols + eps);
    for (int j = 0; j < 8; j++) first[j] = first[j] * factor * first_gain[j];
    if (own < pieces * PIECE) store8(to + own, first);
    for (u32 c = own + step; c < pieces * PIECE; c += step) {
        for (int j = 0; j < 8; j++) a[j] = g[j] = 0.0f;
        if (c < cols) load8(x + c, a), load8(gain + c, g);
        for (int j = 0; j < 8; j++) a[j] = a[j] * factor * g[j];
        store8(to + c, a);
    }
}
#endif

// The codes of a lane's rows in a stage.
struct Codes {
#if UNIT_BYTES == 4
    uint4 words[2 * ROW_TILES];
#if HIGH_BYTES > 0
    u32 high[2 * ROW_TILES][HIGH_BYTES / 4];
#endif
#endif
};
__device__ __forceinline__ Codes load_codes(const u8 *stage, u32 lane) {
    Codes codes;
#if UNIT_BYTES == 4
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        codes.words[i] = *(const uint4 *)(stage + i * 512 + lane * 16);
#if HIGH_BYTES == 4
        codes.high[i][0] = *(const u32 *)(stage + STAGE_HIGH + (i * 32 + lane) * 4);
#elif HIGH_BYTES == 8
        uint2 high = *(const uint2 *)(stage + STAGE_HIGH + (i * 32 + lane) * 8);
        codes.high[i][0] = high.x, codes.high[i][1] = high.y;
#endif
    }
#endif
    return codes;
}

// Writes unit b of a lane's row as f16 pairs.
__device__ __forceinline__ void unit_pairs(const u8 *stage, const Codes &codes, int i, int b, u32 lane, u32 p[4]) {
#if UNIT_BYTES == 4
    u32 low = b == 0 ? codes.words[i].x : b == 1 ? codes.words[i].y : b == 2 ? codes.words[i].z : codes.words[i].w;
    u32 high = 0;
#if HIGH_BYTES == 4
    high = codes.high[i][0] >> (4 * b);
#elif HIGH_BYTES == 8
    high = codes.high[i][b / 2] >> (8 * (b % 2));
#endif
    unpack(low, 0, high, p);
#else
    const u8 *at = stage + i * 512 * SLICES + lane * 16;
#if UNIT_BYTES == 32
    float4 x = *(const float4 *)(at + 2 * b * 512), y = *(const float4 *)(at + (2 * b + 1) * 512);
    p[0] = pack_f16(x.x, x.y), p[1] = pack_f16(x.z, x.w), p[2] = pack_f16(y.x, y.y), p[3] = pack_f16(y.z, y.w);
#elif UNIT_BYTES == 16
    uint4 words = *(const uint4 *)(at + b * 512);
    p[0] = words.x, p[1] = words.y, p[2] = words.z, p[3] = words.w;
#if ELEMENT == DENSE_BF16
#pragma unroll
    for (int j = 0; j < 4; j++) p[j] = pack_f16(low_bf16(p[j]), high_bf16(p[j]));
#endif
#else
    // Both units of a slice, so that the lanes of a load take all banks.
    uint4 words = *(const uint4 *)(at + b / 2 * 512);
    if (b % 2 == 0) unpack(words.x, words.y, 0, p);
    else unpack(words.z, words.w, 0, p);
#endif
#endif
}

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
        // Σ x of the 32 columns, in the place of the sums: a product with ones.
        float x_sums[TOKEN_TILES][4];
        const u32 ones = 0x3c003c00u;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
            multiply_new(x_sums[n], ones, ones, ones, ones, in[n].x, in[n].y);
            multiply(x_sums[n], ones, ones, ones, ones, in[n].z, in[n].w);
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
                    total[r][n][i] += own[0][i / 2].y * (x_sums[n][i] * (1.0f / UNPACKED));
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
