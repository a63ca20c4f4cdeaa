// sum[i, j] /= rows[i] · columns[j]; either may be absent (1).
//   sum [height, width], rows [height] or 0, columns [width] or 0
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y).
// Twin: backend/cpu/mod.rs divide.
extern "C" __global__ void __launch_bounds__(256)
    divide(float *sum, const float *rows, const float *columns, u32 height, u32 width) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= width) return;
    float by_column = columns ? columns[col] : 1.0f;
    for (u32 row = blockIdx.y; row < height; row += gridDim.y)
        sum[(u64)row * width + col] = __fdiv_rn(sum[(u64)row * width + col], (rows ? rows[row] : 1.0f) * by_column);
}
