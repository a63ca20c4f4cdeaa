// quantize_rows: what engines do to the inputs of a W8A8 linear: scale[i] = max|x[i, :]| / 127 (TO = INT8) or / 448 (E4M3),
// codes = x / scale rounded to the nearest integer or E4M3, ties to even; a row of zeros gets scale 0 and codes 0. A scale
// that is given serves all rows, and codes then reach from -128 to 127. A row that is not finite gets the scale NaN, so that it stays visible.
//   x       X [rows, cols]     X is float, f16 or bf16
//   codes   C [rows, cols]     C is i8 for INT8 products, f16 or float where the product runs in floating point (exact);
//                              with KEEP = VALUES they are code * scale
//   scales  f32 [rows]         with KEEP = CODES
//   given   0 for scales of the rows' own
// needs cols % 8 == 0.  grid rows, block 256.
// Twins: backend/cpu quantize_int8, quantize_fp8, quantize_int8_by. Agrees bit for bit for the same x.
#define CODES 0
#define VALUES 1
#define INT8 0
#define E4M3 1
#define LARGEST (TO == E4M3 ? 448.0f : 127.0f)

// Returns x, at most LARGEST in size, rounded to what codes can be.
__device__ __forceinline__ float rounded(float x) {
    if (TO == INT8) return rintf(x);
    // E4M3 keeps 3 bits after the first, and multiples of 2^-9 below 2^-6.
    if (fabsf(x) < 0.015625f) return rintf(x * 512.0f) / 512.0f;
    u32 bits = __float_as_uint(x);
    return __uint_as_float(bits + 0x7ffff + (bits >> 20 & 1) & 0xfff00000u);
}

__device__ __forceinline__ void store_codes(i8 *to, const float x[8]) {
    u32 words[2] = {0, 0};
    for (int j = 0; j < 8; j++) words[j / 4] |= ((u32)(int)x[j] & 0xff) << (8 * (j % 4));
    *(uint2 *)to = make_uint2(words[0], words[1]);
}
__device__ __forceinline__ void store_codes(f16 *to, const float x[8]) { store8(to, x); }
__device__ __forceinline__ void store_codes(float *to, const float x[8]) { store8(to, x); }

extern "C" __global__ void __launch_bounds__(256)
quantize_rows(const X *__restrict__ x, C *__restrict__ codes, float *__restrict__ scales, u32 cols, float given) {
    __shared__ float scratch[32];
    x += (u64)blockIdx.x * cols;
    codes += (u64)blockIdx.x * cols;
    float largest = 0.0f, a[8];
    for (u32 c = 8 * threadIdx.x; c < cols; c += 8 * blockDim.x) {
        load8(x + c, a);
        for (int j = 0; j < 8; j++) largest = fabsf(a[j]) < INFINITY_F ? fmaxf(largest, fabsf(a[j])) : INFINITY_F;
    }
    largest = block_max(largest, scratch);
    float lowest = given > 0.0f ? -128.0f : -LARGEST;
    float scale = given > 0.0f ? given : __fdiv_rn(largest, LARGEST);
    if (!(largest < INFINITY_F)) scale = __int_as_float(0x7fffffff);
    if (KEEP == CODES && threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (u32 c = 8 * threadIdx.x; c < cols; c += 8 * blockDim.x) {
        load8(x + c, a);
        for (int j = 0; j < 8; j++) {
            float ratio = scale > 0.0f ? __fdiv_rn(a[j], scale) : 0.0f;
            a[j] = fminf(fmaxf(rounded(ratio), lowest), LARGEST);
            if (KEEP == VALUES) a[j] = __fmul_rn(a[j], scale);
        }
        store_codes(codes + c, a);
    }
}
