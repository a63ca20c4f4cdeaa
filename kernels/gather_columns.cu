// y[i, k] = x[i, order[k]]
//   x, y [rows, cols] f32, order [cols] u32
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y).
// Twin: method/gptq.rs, which reads columns in order.
extern "C" __global__ void __launch_bounds__(256)
    gather_columns(float *y, const float *x, const u32 *order, u32 rows, u32 cols) {
    u32 k = blockIdx.x * 256 + threadIdx.x;
    if (k >= cols) return;
    u32 from = order[k];
    for (u32 row = blockIdx.y; row < rows; row += gridDim.y)
        y[(u64)row * cols + k] = x[(u64)row * cols + from];
}
