// The two matrices that a super-block's outer factors multiply, 256 columns from `start` on:
//   scaled = stored scale · unit     offsets = - stored minimum (OFFSET=SUBTRACTED only)
//   scaled, offsets [rows, 256] f32; absent columns are 0
// Geometry: a block of 256 threads a row. Macros: scheme.cuh.
// Twin: method/descent.rs refit_outer.
extern "C" __global__ void __launch_bounds__(256) outer_parts(Grids q, float *scaled, float *offsets, u32 start) {
    u32 row = blockIdx.x, col = start + threadIdx.x;
    u64 at = (u64)row * 256 + threadIdx.x;
    bool inside = col < q.cols;
    u32 group = row * q.groups + GROUP_OF(inside ? col : start);
    scaled[at] = inside ? __fmul_rn(q.scales[group], unit_of(q.codes[(u64)row * q.cols + col])) : 0.0f;
#if OFFSET == SUBTRACTED
    offsets[at] = inside ? -q.offsets[group] : 0.0f;
#endif
}
