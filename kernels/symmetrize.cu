// sum[i, j] = sum[j, i] for j > i: the upper half of second moments, of which only the lower one is right; then adds `add`
// to the diagonal and copies what was there before to `diagonal`.
//   sum [cols, cols], diagonal [cols] or 0
// Geometry: flat blocks of 256 threads along a row (x), one row (y in steps of the grid).
// Twin: backend/cpu/mod.rs solver, method/statistics.rs damped.
extern "C" __global__ void __launch_bounds__(256)
    symmetrize(float *sum, float *diagonal, float add, u32 cols) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= cols) return;
    for (u32 row = blockIdx.y; row < cols; row += gridDim.y) {
        u64 at = (u64)row * cols + col;
        if (col > row) {
            sum[at] = sum[(u64)col * cols + row];
        } else if (col == row) {
            float before = sum[at];
            if (diagonal) diagonal[row] = before;
            sum[at] = before + add;
        }
    }
}
