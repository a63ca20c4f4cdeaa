// add_rows: x[rows[i], :] += weights[i] · y[i, :]
//   x        f32 [*, cols]     the residual stream
//   y        X [n, cols]       X is float or f16
//   rows     u32 [n]           each at most once, so that no two blocks write one row
//   weights  f32 [n]
// needs cols % 8 == 0.  grid n, block 128: eight values a thread and step.
// Twin: backend/cpu add_rows.
extern "C" __global__ void __launch_bounds__(128)
add_rows(float *__restrict__ x, const X *__restrict__ y, const u32 *__restrict__ rows,
         const float *__restrict__ weights, u32 cols) {
    float *to = x + (u64)rows[blockIdx.x] * cols;
    const X *from = y + (u64)blockIdx.x * cols;
    float weight = weights[blockIdx.x];
    for (u32 at = 8 * threadIdx.x; at < cols; at += 8 * blockDim.x) {
        float a[8], b[8];
        load8(to + at, a);
        load8(from + at, b);
        for (int j = 0; j < 8; j++) a[j] += weight * b[j];
        store8(to + at, a);
    }
}
