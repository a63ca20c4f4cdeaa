// scale_rows: y[i, j] = x[i, j] · factors[i]
//   x, y     X [rows, cols], count values in all     X is float or f16
//   factors  f32 [rows]
// needs cols % 8 == 0.  grid ceil(count / 2048), block 256: eight values a thread.
// Twin: backend/cpu/gradients.rs scale_rows.
extern "C" __global__ void __launch_bounds__(256)
scale_rows(const X *__restrict__ x, const float *__restrict__ factors, X *__restrict__ y, u64 count, u32 cols) {
    u64 at = 8 * ((u64)blockIdx.x * 256 + threadIdx.x);
    if (at >= count) return;
    float a[8], factor = factors[at / cols];
    load8(x + at, a);
    for (int j = 0; j < 8; j++) a[j] *= factor;
    store8(y + at, a);
}
