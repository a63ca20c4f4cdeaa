// The macros that say which scheme a kernel is compiled for, set by backend/cuda/weight.rs:
//
//   ELEMENT      one of DENSE_F32, DENSE_F16, DENSE_BF16, E2M1, E4M3, INT, UINT, TABLE
//   TABLE_VALUES the values of TABLE, ascending, with commas
//   BITS         bits of a code
//   GROUP        columns that share a scale; ROW or TENSOR
//   SCALE        codec of the (inner) scales
//   OUTER        codec of the outer scales, or NONE; OUTER_GROUP as GROUP
//   OFFSET       NONE, ADDED or SUBTRACTED; OFFSET_CODEC

#define NONE -1
#define DENSE_F32 0
#define DENSE_F16 1
#define DENSE_BF16 2
#define E2M1 3
#define E4M3 4
#define INT 5
#define UINT 6
#define TABLE 7

#define CODEC_F32 0
#define CODEC_F16 1
#define CODEC_BF16 2
#define CODEC_E8M0 3
#define CODEC_E4M3 4
#define CODEC_U6 5
#define CODEC_I8 6
#define CODEC_U4 7
#define CODEC_I6 8
#define CODEC_ODD_EIGHTHS 9

#define ROW 0
#define TENSOR -1

#define ADDED 1
#define SUBTRACTED 2

// Sign, 4 exponent bits with bias 7, 3 mantissa bits. Placed in an F32's fields it is the value · 2^-120, subnormals
// included; S.1111.111 is NaN.
__device__ __forceinline__ float e4m3_to_float(u32 code) {
    if ((code & 0x7f) == 0x7f) return __int_as_float(0x7fffffff);
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * __uint_as_float(0x7b800000);
}
