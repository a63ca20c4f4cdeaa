// A matrix whose codes and scales are being chosen, for every scheme (scheme.cuh): one code a byte and F32 values of the
// stored scales, as QTensor keeps them. Elements are computed as numbers ("units"); codes are only how they are stored.
// Twins: num/element.rs, num/codec.rs, scheme/qtensor.rs grid, method/refit.rs.

struct Grids {
    u8 *codes;            // [rows, cols]
    float *scales;        // [rows, groups]
    float *offsets;       // the same, where OFFSET is not NONE
    float *outer;         // [rows, outers], or one
    float *outer_offsets; // the same, where OFFSET is SUBTRACTED
    u32 cols;
    u32 groups; // of a row
    u32 outers; // of a row
    u32 unused;
};

// Columns of a group, and which group a column is in.
#if GROUP == ROW
#define GROUP_OF(column) 0u
#else
#define GROUP_OF(column) ((column) / (u32)GROUP)
#endif

struct Grid {
    float scale;
    float inverse; // 0 where the scale is 0
    float offset;
};

__device__ __forceinline__ u32 outer_of(const Grids &q, u32 row, u32 group) {
#if OUTER == NONE || OUTER_GROUP == TENSOR
    return 0;
#else
    return row * q.outers + group * (u32)GROUP / (u32)OUTER_GROUP;
#endif
}

// Factors that turn a stored scale and a stored offset into effective ones.
__device__ __forceinline__ float2 outer_factors(const Grids &q, u32 row, u32 group) {
    u32 outer = outer_of(q, row, group);
#if OUTER == NONE
    float scale = 1.0f;
#else
    float scale = q.outer[outer];
#endif
#if OFFSET == SUBTRACTED
    return make_float2(scale, -q.outer_offsets[outer]);
#else
    return make_float2(scale, 1.0f);
#endif
}

__device__ __forceinline__ Grid effective(float2 factors, float scale, float offset) {
    scale = __fmul_rn(factors.x, scale);
    Grid grid = {scale, scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale), __fmul_rn(factors.y, offset)};
    return grid;
}

__device__ __forceinline__ float stored_offset(const Grids &q, u32 row, u32 group) {
#if OFFSET == NONE
    return 0.0f;
#else
    return q.offsets[row * q.groups + group];
#endif
}

__device__ __forceinline__ Grid grid_at(const Grids &q, u32 row, u32 group) {
    return effective(outer_factors(q, row, group), q.scales[row * q.groups + group], stored_offset(q, row, group));
}

// Rounded as QTensor::decode_row: no fused multiply-add.
__device__ __forceinline__ float value_of(const Grid &grid, float unit) {
    return __fadd_rn(__fmul_rn(grid.scale, unit), grid.offset);
}

// Returns |x| rounded to a float of `1 / step` steps a binade, binades below `smallest` like that one; ties to even. Adding
// 1.5 · 2^23 steps makes the last place of the sum one step, so the addition rounds.
__device__ __forceinline__ float round_float(float a, float smallest, float step) {
    float binade = __uint_as_float(__float_as_uint(a) & 0x7f800000u);
    float magic = fmaxf(binade, smallest) * (12582912.0f * step);
    return __fsub_rn(__fadd_rn(a, magic), magic);
}

__device__ __forceinline__ float round_integer(float x) {
    return __fsub_rn(__fadd_rn(x, 12582912.0f), 12582912.0f);
}

#if ELEMENT == TABLE
constexpr i8 TABLE_UNITS[] = {TABLE_VALUES};
constexpr int TABLE_COUNT = sizeof(TABLE_UNITS);
#endif

// Returns the element nearest to x, ties to even (of a table: to the lower), saturating.
__device__ __forceinline__ float nearest(float x) {
#if ELEMENT == INT
    const float half = (float)(1 << (BITS - 1));
    return round_integer(fminf(fmaxf(x, -half), half - 1.0f));
#elif ELEMENT == UINT
    return round_integer(fminf(fmaxf(x, 0.0f), (float)((1 << BITS) - 1)));
#elif ELEMENT == TABLE
    constexpr i8 values[] = {TABLE_VALUES};
    float unit = (float)values[0];
#pragma unroll
    for (int i = 0; i + 1 < TABLE_COUNT; i++)
        if (2.0f * x > (float)(values[i] + values[i + 1])) unit = (float)values[i + 1];
    return unit;
#elif ELEMENT == E2M1
    return copysignf(round_float(fminf(fabsf(x), 6.0f), 1.0f, 0.5f), x);
#else
    return copysignf(round_float(fminf(fabsf(x), 448.0f), 0.015625f, 0.125f), x);
#endif
}

__device__ __forceinline__ u32 e4m3_of(float unit) {
    u32 bits = __float_as_uint(unit), magnitude = bits & 0x7fffffffu;
    float a = __uint_as_float(magnitude);
    return (bits >> 31) << 7 | (a >= 0.015625f ? (magnitude >> 20) - 960u : (u32)(a * 512.0f));
}

__device__ __forceinline__ u8 code_of(float unit) {
#if ELEMENT == INT
    return (u8)__float_as_uint(unit + (8388608.0f + (float)(1 << (BITS - 1))));
#elif ELEMENT == UINT
    return (u8)__float_as_uint(unit + 8388608.0f);
#elif ELEMENT == TABLE
    constexpr i8 values[] = {TABLE_VALUES};
    u8 code = 0;
#pragma unroll
    for (int i = 1; i < TABLE_COUNT; i++) code += unit >= (float)values[i];
    return code;
#elif ELEMENT == E2M1
    u32 bits = __float_as_uint(unit), magnitude = bits & 0x7fffffffu;
    return (u8)((bits >> 31) << 3 | (magnitude >= 0x3f800000u ? (magnitude >> 22) - 252u : magnitude != 0));
#else
    return (u8)e4m3_of(unit);
#endif
}

__device__ __forceinline__ float unit_of(u8 code) {
#if ELEMENT == INT
    return (float)code - (float)(1 << (BITS - 1));
#elif ELEMENT == UINT
    return (float)code;
#elif ELEMENT == TABLE
    constexpr i8 values[] = {TABLE_VALUES};
    float unit = (float)values[0];
#pragma unroll
    for (int i = 1; i < TABLE_COUNT; i++)
        if (code >= i) unit = (float)values[i];
    return unit;
#elif ELEMENT == E2M1
    u32 magnitude = code & 7u;
    float a = magnitude < 2u ? 0.5f * (float)magnitude : __uint_as_float((magnitude + 252u) << 22);
    return copysignf(a, __uint_as_float((u32)(code & 8u) << 28));
#else
    return e4m3_to_float(code);
#endif
}

// Returns the number a codec stores for x.
template <int CODEC> __device__ __forceinline__ float round_stored(float x) {
    switch (CODEC) {
    case CODEC_F16: return half_to_float((u16)pack_f16(fminf(fmaxf(x, -65504.0f), 65504.0f), 0.0f));
    case CODEC_BF16: {
        const float largest = __uint_as_float(0x7f7f0000u);
        return low_bf16(pack_bf16(fminf(fmaxf(x, -largest), largest), 0.0f));
    }
    case CODEC_E8M0: {
        if (!(x > __uint_as_float(0x00600000u))) return __uint_as_float(0x00400000u);
        u32 bits = __float_as_uint(fminf(x, __uint_as_float(0x7f000000u))) + 0x00400000u;
        return __uint_as_float(min(bits, 0x7f000000u) & 0x7f800000u);
    }
    case CODEC_E4M3: return round_float(fminf(fmaxf(x, 0.0f), 448.0f), 0.015625f, 0.125f);
    case CODEC_U4: return fminf(fmaxf(round_integer(x), 0.0f), 15.0f);
    case CODEC_I6: return fminf(fmaxf(round_integer(x), -32.0f), 31.0f);
    case CODEC_U6: return fminf(fmaxf(round_integer(x), 0.0f), 63.0f);
    case CODEC_I8: return fminf(fmaxf(round_integer(x), -128.0f), 127.0f);
    default: return x;
    }
}
