// rescale: y[i, o] = sums[i, o] · (x_scales[i] · w_scales[o]) + bias[o], the epilogue of W8A8 products
//   sums      S [rows, cols]     int (INT8 products) or float
//   x_scales  f32 [rows]
//   w_scales  f32 [cols] or null (1: the weights were dequantized)
//   bias      f32 [cols] or null
//   y         Y [rows, cols]     written, or added to when `accumulate` (then Y is float: the residual stream)
// needs cols % 4 == 0.  grid (rows, ceil(cols / 1024)), block 256: four values a thread.
// Twin: backend/cpu.rs linear with Activations::Int8PerToken.
__device__ __forceinline__ void load_sums(const float *from, float x[4]) { load4(from, x); }
__device__ __forceinline__ void load_sums(const int *from, float x[4]) {
    int4 a = *(const int4 *)from;
    x[0] = (float)a.x, x[1] = (float)a.y, x[2] = (float)a.z, x[3] = (float)a.w;
}
extern "C" __global__ void __launch_bounds__(256)
rescale(const S *__restrict__ sums, const float *__restrict__ x_scales, const float *__restrict__ w_scales,
        const float *__restrict__ bias, Y *__restrict__ y, u32 cols, u32 accumulate) {
    u32 c = 4 * (blockIdx.y * 256 + threadIdx.x);
    if (c >= cols) return;
    u64 at = (u64)blockIdx.x * cols + c;
    float s[4], w[4] = {1.0f, 1.0f, 1.0f, 1.0f}, b[4] = {}, a[4] = {};
    load_sums(sums + at, s);
    if (w_scales) load4(w_scales + c, w);
    if (bias) load4(bias + c, b);
    if (accumulate) load4(y + at, a);
    for (int j = 0; j < 4; j++) s[j] = s[j] * (x_scales[blockIdx.x] * w[j]) + b[j] + a[j];
    store4(y + at, s);
}
