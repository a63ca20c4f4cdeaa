// cast: y = x + bias, rounded once to Y; also plain conversion (bias absent)
//   x     X [rows, cols]
//   bias  f32 [cols] or null
//   y     Y [rows, cols]
// needs cols % 8 == 0.  grid ceil(rows · cols / 2048), block 256: eight values a thread.
// Twin: the bias of backend/cpu.rs linear.
extern "C" __global__ void __launch_bounds__(256)
cast(const X *__restrict__ x, const float *__restrict__ bias, Y *__restrict__ y, u64 count, u32 cols) {
    u64 at = 8 * ((u64)blockIdx.x * 256 + threadIdx.x);
    if (at >= count) return;
    float a[8], b[8];
    load8(x + at, a);
    if (bias) {
        load8(bias + at % cols, b);
        for (int j = 0; j < 8; j++) a[j] += b[j];
    }
    store8(y + at, a);
}
