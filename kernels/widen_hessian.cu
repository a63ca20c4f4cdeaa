// wide[i, j] = sum[o(i), o(j)] + (i = j) · add for j <= i, in F64, where o(i) = order[cols - 1 - i], or i without an order:
// what cuSOLVER factors.
//   wide [cols, cols] f64, sum [cols, cols], order [cols] u32 or 0
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y).
// Twin: method/gptq.rs Feedback::new.
extern "C" __global__ void __launch_bounds__(256)
    widen_hessian(double *wide, const float *sum, const u32 *order, float add, u32 cols) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= cols) return;
    u32 from_col = order ? order[cols - 1 - col] : col;
    for (u32 row = blockIdx.y; row < cols; row += gridDim.y) {
        if (col > row) continue;
        u32 from_row = order ? order[cols - 1 - row] : row;
        float x = sum[(u64)from_row * cols + from_col];
        wide[(u64)row * cols + col] = (double)(row == col ? __fadd_rn(x, add) : x);
    }
}
