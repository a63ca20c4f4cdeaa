// Copies codes, scale and gradient of the rows whose `better` is not 0, for schemes with one scale a row.
//   from, to: the same shape; from_gradient, to_gradient [rows, cols]; better [rows] u32
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y). Macros: scheme.cuh.
// Twin: method/descent.rs improve_scale.
extern "C" __global__ void __launch_bounds__(256)
    adopt(Grids from, Grids to, const float *from_gradient, float *to_gradient, const u32 *better, u32 rows) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= from.cols) return;
    for (u32 row = blockIdx.y; row < rows; row += gridDim.y) {
        if (!better[row]) continue;
        u64 at = (u64)row * from.cols + col;
        to.codes[at] = from.codes[at];
        to_gradient[at] = from_gradient[at];
        if (col == 0) to.scales[row] = from.scales[row];
    }
}
