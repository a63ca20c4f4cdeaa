// maxima[j] = max(maxima[j], |x[i, j]|) over all rows i; a NaN stays, since its bits, without the sign, exceed all others.
//   maxima  f32 [cols], at least 0
//   x       X [rows, cols]     X is float or f16
// grid (ceil(cols / 256), ceil(rows / 64)), block 256: a thread takes 64 values of a column.
// Twin: backend/cpu add_maxima. The same bits in whatever order blocks run.
extern "C" __global__ void __launch_bounds__(256) maxima(float *maxima, const X *__restrict__ x, u32 rows, u32 cols) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= cols) return;
    u32 end = min(64 * (blockIdx.y + 1), rows);
    u32 largest = 0;
    for (u32 row = 64 * blockIdx.y; row < end; row++) {
        float value = fabsf(to_float(x[(u64)row * cols + col]));
        largest = max(largest, __float_as_uint(value));
    }
    atomicMax((u32 *)maxima + col, largest);
}
