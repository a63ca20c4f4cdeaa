// Rounds the values of one grid to the nearest of another with one scale a row, and says how they move.
//   from, to: the same shape; to's scales are set, its codes are written
//   changes [rows, cols] f32
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y). Macros: scheme.cuh.
// Twin: the first step of method/descent.rs resolve.
extern "C" __global__ void __launch_bounds__(256) regrid(Grids from, Grids to, float *changes, u32 rows) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= from.cols) return;
    for (u32 row = blockIdx.y; row < rows; row += gridDim.y) {
        u64 at = (u64)row * from.cols + col;
        float value = value_of(grid_at(from, row, GROUP_OF(col)), unit_of(from.codes[at]));
        Grid grid = grid_at(to, row, GROUP_OF(col));
        float unit = nearest((value - grid.offset) * grid.inverse);
        to.codes[at] = code_of(unit);
        changes[at] = value_of(grid, unit) - value;
    }
}
