// Stored weights → numbers, for every scheme: value = scale · element[code] + offset, rounded in that order, so that the
// result equals QTensor::decode_row bit for bit. The scheme comes in as macros: scheme.cuh.
//
// Layout. Eight codes are one unit. Dense weights and INT8 with one scale a row (PLAIN, what matrix products read as it
// lies) keep column order. Other rows are padded with zeros to `pitch`, a multiple of 128 columns, and each piece of 128 is
// reordered, so that a lane of matvec.cu loads its four units at once and units of a load share their scales: stored unit
// 4t + b (8(b / 2) + 2t + b % 2 for codes of more than 6 bits) holds the columns 32b + 8t .. + 8 of its piece; where 16 columns
// share a scale, 32b + 4t .. + 4 and 32b + 16 + 4t .. + 4.
//   low    up to 6 bits: u32 a unit; columns 2j and 2j + 1 in the two halves, so that one mask picks both. In each half
//          nibble j is column pair j; E2M1 has pair 0 in the bits of an f16 (15, 11 .. 9), pair 1 three bits lower, pairs
//          2 and 3 with signs in bits 14 and 13 and magnitudes in bits 5 .. 3 and 2 .. 0. 7 and 8 bits: u64 a unit, in
//          column order, INT as two's complement
//   high   bits above the fourth. 5 bits: u32 for four units, bits 4b + j and 16 + 4b + j are pair j of unit b;
//          6 bits: u32 for two units, two bits from 8b + 2j and 16 + 8b + 2j on
//   scales, outer, offsets, outer_offsets: stored bits of their codecs, one entry a group, 1, 2 or 4 bytes each; of eight
//          rows together, those of a piece (or of a longer group) behind each other, row by row: what a tile reads is dense
// Twin: scheme/qtensor.rs decode_row.

#if ELEMENT == TABLE
#error "values by table lie in GPU memory as INT8: backend/cuda/widen.rs"
#endif
#define DENSE (ELEMENT == DENSE_F32 || ELEMENT == DENSE_F16 || ELEMENT == DENSE_BF16)
#if DENSE
#define BITS 16
#define GROUP ROW
#define OFFSET NONE
#endif
#define PLAIN (DENSE || (ELEMENT == INT && BITS == 8 && GROUP == ROW))
// Unpacked codes times this are the elements.
#define UNPACKED (ELEMENT == E2M1 ? 16384.0f : ELEMENT == E4M3 ? 256.0f : 1.0f)

struct Weight {
    const u8 *low;
    const u8 *high;
    const u8 *scales;
    const u8 *outer;
    const u8 *offsets;
    const u8 *outer_offsets;
    u32 cols;
    u32 pitch;
};

template <int CODEC> __device__ __forceinline__ float stored(const u8 *from, u32 at) {
    switch (CODEC) {
    case CODEC_F32: return ((const float *)from)[at];
    case CODEC_F16: return half_to_float(((const u16 *)from)[at]);
    case CODEC_BF16: return __uint_as_float((u32)((const u16 *)from)[at] << 16);
    // Byte 0 is 2^-127, a subnormal F32; 255 is NaN.
    case CODEC_E8M0: {
        u32 byte = from[at];
        return __uint_as_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fffffffu : byte << 23);
    }
    case CODEC_E4M3: return e4m3_to_float(from[at]);
    case CODEC_U4:
    case CODEC_U6: return (float)from[at];
    case CODEC_I6: return (float)from[at] - 32.0f;
    case CODEC_ODD_EIGHTHS: return (float)(2 * from[at] + 1) * 0.125f;
    default: return (float)(i8)from[at];
    }
}

// Entries of a plane for a row and piece, or one for a longer group; and how many columns these cover.
template <int COLS> __device__ constexpr u32 entries_of() { return COLS > 0 && COLS < 128 ? 128 / COLS : 1; }
template <int COLS> __device__ constexpr u32 covered_by() { return COLS > 128 ? COLS : 128; }

// Returns where a plane holds the entry of a row and column. Rows are whole groups: the launcher checks.
template <int COLS> __device__ __forceinline__ u32 group_of(u32 row, u32 column, u32 pitch) {
    if (COLS == TENSOR) return 0;
    if (COLS == ROW) return row;
    const u32 entries = entries_of<COLS>(), covered = covered_by<COLS>();
    return ((row / 8 * (pitch / covered) + column / covered) * 8 + row % 8) * entries +
           column % covered / (u32)(COLS > 0 ? COLS : 1);
}

__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

#if !DENSE
// Writes a unit's codes as exact f16 pairs (0, 1), (2, 3), (4, 5), (6, 7): elements divided by UNPACKED. `high` is shifted
// down to this unit's bits.
__device__ __forceinline__ void unpack(u32 low, u32 more, u32 high, u32 p[4]) {
#if ELEMENT == E2M1
    // Sign and fields in place of an f16's are the value · 2^-14; ½ is a subnormal there, which products keep.
    p[0] = low & 0x8e008e00u;
    p[1] = low << 3 & 0x8e008e00u;
    p[2] = (low << 1 & 0x80008000u) | (low << 6 & 0x0e000e00u);
    p[3] = (low << 2 & 0x80008000u) | (low << 9 & 0x0e000e00u);
#else
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if ELEMENT == E4M3
        // As above: the value · 2^-8.
        u32 top = __byte_perm(j < 2 ? low : more, 0, j % 2 ? 0x3424 : 0x1404);
        p[j] = (top & 0x80008000u) | (top >> 1 & 0x3f803f80u);
#elif BITS > 6
        // 1024 + u is an f16 for u < 1024.
        u32 word = (j < 2 ? low : more) ^ (ELEMENT == INT ? 0x80808080u : 0);
        u32 base = 1024 + (ELEMENT == INT ? 128 : 0);
        p[j] = fma_pair(__byte_perm(word, 0x64646464, j % 2 ? 0x4342 : 0x4140), 0x3c003c00u,
                        (0xe400u + (base - 1024)) * 0x10001u);
#else
        // 1024 + v; the second nibble of a byte is taken in place as 1024 + 16v.
        u32 v = ((j < 2 ? low : low >> 8) & (j % 2 ? 0x00f000f0u : 0x000f000fu)) | 0x64006400u;
        const int up = j % 2 ? 8 : 4;
#if BITS == 5
        v |= high << (up - j) & (0x00010001u << up);
#elif BITS == 6
        v |= high << (up - 2 * j) & (0x00030003u << up);
#endif
        const u32 offset = ELEMENT == INT ? 1 << (BITS - 1) : 0;
        p[j] = j % 2 ? fma_pair(v, 0x2c002c00u, (0xd400u + 16 * offset) * 0x10001u)
                     : fma_pair(v, 0x3c003c00u, (0xe400u + offset) * 0x10001u);
#endif
    }
#endif
}

// Returns the scale and offset at a row and column.
__device__ __forceinline__ float2 grid_at(const Weight &w, u32 row, u32 column) {
    u32 group = group_of<GROUP>(row, column, w.pitch);
    float scale = stored<SCALE>(w.scales, group), offset = 0.0f;
#if OUTER != NONE
    u32 outer = group_of<OUTER_GROUP>(row, column, w.pitch);
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

// Returns which element of the padded matrix the first (half = 0) or second four of stored unit s start at.
__device__ __forceinline__ u32 first_of(u32 s, int half) {
#if PLAIN
    return 8 * s + 4 * half;
#elif GROUP == 16 && BITS <= 6
    return 8 * (s & ~15u) + s % 4 * 32 + 16 * half + s / 4 % 4 * 4;
#elif GROUP == 16
    return 8 * (s & ~15u) + (s / 8 % 2 * 2 + s % 2) * 32 + 16 * half + s / 2 % 4 * 4;
#elif BITS > 6
    return 8 * (s & ~15u) + (s / 8 % 2 * 2 + s % 2) * 32 + s / 2 % 4 * 8 + 4 * half;
#else
    return 8 * (s & ~15u) + s % 4 * 32 + s / 4 % 4 * 8 + 4 * half;
#endif
}

// Writes the eight values of stored unit s, exact in F32.
__device__ __forceinline__ void decode_unit(const Weight &w, u32 s, float x[8]) {
#if ELEMENT == DENSE_F32
    load8((const float *)w.low + 8ull * s, x);
#elif ELEMENT == DENSE_BF16
    load8((const bf16 *)w.low + 8ull * s, x);
#elif ELEMENT == DENSE_F16
    load8((const f16 *)w.low + 8ull * s, x);
#else
    u32 high = 0, p[4];
#if BITS > 6
    uint2 low = ((const uint2 *)w.low)[s];
    unpack(low.x, low.y, high, p);
#else
#if BITS == 5
    high = ((const u32 *)w.high)[s / 4] >> (4 * (s % 4));
#elif BITS == 6
    high = ((const u32 *)w.high)[s / 2] >> (8 * (s % 2));
#endif
    unpack(((const u32 *)w.low)[s], 0, high, p);
#endif
    u32 first = first_of(s, 0), row = first / w.pitch, start = row * w.pitch;
    float2 grid = grid_at(w, row, first - start);
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if GROUP == 16
        if (j == 2) grid = grid_at(w, row, first_of(s, 1) - start);
#endif
        // Separate roundings, no fused multiply-add: bit-exact against the CPU. Adding 0 turns -0 into 0 there as here.
        x[2 * j] = __fadd_rn(__fmul_rn(grid.x, half_to_float((u16)p[j]) * UNPACKED), grid.y);
        x[2 * j + 1] = __fadd_rn(__fmul_rn(grid.x, half_to_float((u16)(p[j] >> 16)) * UNPACKED), grid.y);
    }
#if ELEMENT == E4M3
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (((j < 4 ? low.x >> 8 * j : low.y >> (8 * j - 32)) & 0x7f) == 0x7f) x[j] = __int_as_float(0x7fffffff);
#endif
#endif
}
