// y = values of the codes (WHAT=VALUE) or their units (WHAT=UNIT), less `target` where there is one.
//   y [rows, cols] of type Y, target [rows, cols] f32 or 0
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y). Macros: scheme.cuh, WHAT, Y.
// Twin: scheme/qtensor.rs decode.
#define VALUE 0
#define UNIT 1
extern "C" __global__ void __launch_bounds__(256) values(Grids q, const float *target, Y *y, u32 rows) {
    u32 col = blockIdx.x * 256 + threadIdx.x;
    if (col >= q.cols) return;
    for (u32 row = blockIdx.y; row < rows; row += gridDim.y) {
        u64 at = (u64)row * q.cols + col;
        float x = unit_of(q.codes[at]);
        if (WHAT == VALUE) x = value_of(grid_at(q, row, GROUP_OF(col)), x);
        store(y + at, target ? x - target[at] : x);
    }
}
