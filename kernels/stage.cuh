// stage: how matvec.cu brings weights and tokens to shared memory, and reads them there. A stage holds what a warp needs of a
// piece of 128 columns: codes, bits above the fourth, scales and offsets of ROW_TILES · 16 rows, and the tokens' columns.

// Values of OUTPUT.
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
