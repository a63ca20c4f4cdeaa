// Least squares in the outer scale and outer offset of one super-block of each row (256 columns from `start` on), codes and
// inner scales as they are. Changes of values go to `changes`; the caller adds changes · H to the gradient.
//   scaled, offsets of outer_parts.cu; with_scaled, with_offsets: those times the super-block's part of H, [rows, 256]
//   gradient [rows, cols], changes [rows, 256]
// Geometry: a warp a row, 8 rows a block. Macros: scheme.cuh.
// Twin: method/descent.rs refit_outer; method/refit.rs Normal.
__device__ __forceinline__ double warp_sum(double x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

extern "C" __global__ void __launch_bounds__(256)
    refit_outer(Grids q, const float *scaled, const float *offsets, const float *with_scaled,
                const float *with_offsets, const float *gradient, float *changes, u32 rows, u32 start) {
    const u32 lane = threadIdx.x, row = blockIdx.x * 8 + threadIdx.y;
    if (row >= rows) return;
    const u32 width = min(q.cols - start, 256u);
    double cc = 0, cu = 0, uu = 0, cg = 0, ug = 0;
    for (u32 k = lane; k < width; k += 32) {
        u64 at = (u64)row * 256 + k;
        double s = scaled[at], g = gradient[(u64)row * q.cols + start + k];
        cc += s * with_scaled[at], cg += s * g;
#if OFFSET == SUBTRACTED
        double o = offsets[at];
        cu += o * with_scaled[at], uu += o * with_offsets[at], ug += o * g;
#endif
    }
    cc = warp_sum(cc), cu = warp_sum(cu), uu = warp_sum(uu), cg = warp_sum(cg), ug = warp_sum(ug);
    float scale = cc > 0.0 ? (float)(-cg / cc) : 0.0f, offset = 0.0f;
    double determinant = cc * uu - cu * cu;
    if (uu != 0.0 && determinant > 1e-6 * cc * uu) {
        scale = (float)((cu * ug - uu * cg) / determinant);
        offset = (float)((cu * cg - cc * ug) / determinant);
    }
    const u32 outer = outer_of(q, row, GROUP_OF(start));
    const float old_scale = q.outer[outer], new_scale = round_stored<OUTER>(old_scale + scale);
    const double ds = new_scale - old_scale;
    double change = 2.0 * ds * cg + ds * ds * cc;
#if OFFSET == SUBTRACTED
    const float old_offset = q.outer_offsets[outer];
    const float new_offset = fmaxf(round_stored<OUTER>(old_offset + offset), 0.0f);
    const double d = new_offset - old_offset;
    change += 2.0 * d * ug + 2.0 * ds * d * cu + d * d * uu;
#endif
    const bool kept = new_scale != 0.0f && change < 0.0;
    float2 factors = make_float2(new_scale, 1.0f);
#if OFFSET == SUBTRACTED
    factors.y = -new_offset;
#endif
    for (u32 k = lane; k < 256; k += 32) {
        float step = 0.0f;
        if (kept && k < width) {
            u32 col = start + k, group = GROUP_OF(col);
            float unit = unit_of(q.codes[(u64)row * q.cols + col]);
            Grid grid = effective(factors, q.scales[row * q.groups + group], stored_offset(q, row, group));
            step = value_of(grid, unit) - value_of(grid_at(q, row, group), unit);
        }
        changes[(u64)row * 256 + k] = step;
    }
    __syncwarp();
    if (kept && lane == 0) {
        q.outer[outer] = new_scale;
#if OFFSET == SUBTRACTED
        q.outer_offsets[outer] = new_offset;
#endif
    }
}
