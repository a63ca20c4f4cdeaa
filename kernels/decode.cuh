// Stored weights → F32, for every scheme: value = scale · element[code] + offset, rounded in that order, so that the
// result equals QTensor::decode_row bit for bit. The scheme comes in as macros, set by backend/cuda/weight.rs:
//
//   ELEMENT      one of DENSE_F32, DENSE_F16, DENSE_BF16, E2M1, E4M3, INT, UINT
//   BITS         bits of a code
//   GROUP        columns that share a scale; ROW or TENSOR
//   SCALE        codec of the (inner) scales
//   OUTER        codec of the outer scales, or NONE; OUTER_GROUP as GROUP
//   OFFSET       NONE, ADDED or SUBTRACTED; OFFSET_CODEC
//
// Layout. Eight columns are one unit: unit u of the flat row-major matrix holds elements 8u .. 8u + 8.
//   low    4-bit plane, u32 a unit: column 2j in nibble j, column 2j + 1 in nibble 4 + j, so that masks such as
//          0x000f000f pick neighbours into the two halves of a register; for 7 and 8 bits an 8-bit plane, u64 a unit,
//          in column order, INT as two's complement (what INT8 matrix units read)
//   high   bits above the fourth: 5 bits: u8 a unit (bit j = column j); 6 bits: u16 a unit (bits 2j, 2j + 1)
//   scales, outer, offsets, outer_offsets: stored bits of their codecs, one entry a group, 1, 2 or 4 bytes each
// Twin: scheme/qtensor.rs decode_row.

#define NONE -1
#define DENSE_F32 0
#define DENSE_F16 1
#define DENSE_BF16 2
#define E2M1 3
#define E4M3 4
#define INT 5
#define UINT 6

#define CODEC_F32 0
#define CODEC_F16 1
#define CODEC_BF16 2
#define CODEC_E8M0 3
#define CODEC_E4M3 4
#define CODEC_U6 5
#define CODEC_I8 6

#define ROW 0
#define TENSOR -1

#define ADDED 1
#define SUBTRACTED 2

struct Weight {
    const u8 *low;
    const u8 *high;
    const u8 *scales;
    const u8 *outer;
    const u8 *offsets;
    const u8 *outer_offsets;
    u32 cols;
};

// Sign, 4 exponent bits with bias 7, 3 mantissa bits. Placed in an F32's fields it is the value · 2^-120, subnormals
// included; S.1111.111 is NaN.
__device__ __forceinline__ float e4m3_to_float(u32 code) {
    if ((code & 0x7f) == 0x7f) return __int_as_float(0x7fffffff);
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * __uint_as_float(0x7b800000);
}

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
    case CODEC_U6: return (float)from[at];
    default: return (float)(i8)from[at];
    }
}

// Returns the group that flat element `i` is in. Rows are whole groups: the launcher checks.
template <int COLS> __device__ __forceinline__ u32 group_of(u32 i, u32 cols) {
    return COLS == TENSOR ? 0 : COLS == ROW ? i / cols : i / (u32)(COLS > 0 ? COLS : 1);
}

// Returns the value of a code at unit scale; every step is exact.
__device__ __forceinline__ float element(u32 code) {
#if ELEMENT == E2M1
    // Fields of E2M1 placed in an F32's give the value · 2^-126; ½ comes out as a subnormal, correctly.
    return __uint_as_float((code & 8) << 28 | (code & 7) << 22) * __uint_as_float(0x7e800000);
#elif ELEMENT == E4M3
    return e4m3_to_float(code);
#elif ELEMENT == INT && BITS == 8
    // 2^23 + u is exact, so integers become floats without the slower conversion unit.
    return __uint_as_float(0x4b000000u | (code ^ 0x80)) - (8388608.0f + 128.0f);
#elif ELEMENT == INT
    return __uint_as_float(0x4b000000u | code) - (8388608.0f + (float)(1 << (BITS - 1)));
#else
    return __uint_as_float(0x4b000000u | code) - 8388608.0f;
#endif
}

// Writes the eight values of a unit.
__device__ __forceinline__ void decode_unit(const Weight &w, u32 unit, float x[8]) {
#if ELEMENT == DENSE_F32
    load8((const float *)w.low + 8ull * unit, x);
#elif ELEMENT == DENSE_BF16
    load8((const bf16 *)w.low + 8ull * unit, x);
#elif ELEMENT == DENSE_F16
    load8((const f16 *)w.low + 8ull * unit, x);
#else
    u32 i = 8 * unit;
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
#if BITS > 6
    uint2 low = ((const uint2 *)w.low)[unit];
#else
    u32 low = ((const u32 *)w.low)[unit];
#endif
#if BITS == 5
    u32 high = w.high[unit];
#elif BITS == 6
    u32 high = ((const u16 *)w.high)[unit];
#endif
#pragma unroll
    for (int j = 0; j < 8; j++) {
#if BITS > 6
        u32 code = (j < 4 ? low.x >> (8 * j) : low.y >> (8 * j - 32)) & 0xff;
#else
        u32 code = low >> (4 * (j / 2) + 16 * (j % 2)) & 15;
#endif
#if BITS == 5
        code |= (high >> j & 1) << 4;
#elif BITS == 6
        code |= (high >> (2 * j) & 3) << 4;
#endif
        // Separate roundings, no fused multiply-add: bit-exact against the CPU. Adding 0 turns -0 into 0 there as here.
        x[j] = __fadd_rn(__fmul_rn(scale, element(code)), offset);
    }
#endif
}
