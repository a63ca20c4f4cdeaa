// row_energies: sums[i] = Σ x[i, j]²
//   x     X [rows, cols]     X is float or f16
//   sums  f32 [rows]
// needs cols % 8 == 0.  grid ceil(rows / 8), block (32, 8): one warp a row.
// Twin: backend/cpu/gradients.rs row_energies.
extern "C" __global__ void __launch_bounds__(256)
row_energies(const X *__restrict__ x, float *__restrict__ sums, u32 rows, u32 cols) {
    u32 row = blockIdx.x * 8 + threadIdx.y;
    if (row >= rows) return;
    float sum = 0.0f, a[8];
    for (u32 c = 8 * threadIdx.x; c < cols; c += 256) {
        load8(x + (u64)row * cols + c, a);
        for (int j = 0; j < 8; j++) sum += a[j] * a[j];
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) sums[row] = sum;
}
