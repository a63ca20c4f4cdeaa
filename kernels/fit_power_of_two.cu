// Power-of-two scales for groups of 32 columns, and the nearest codes under them. From the exponent of a group's largest
// magnitude, with `carry` added to its bits first, comes the rule's scale s; with `search`, of s, 2 s and s / 2 the one of
// least weighted squared error.
//   target [rows, cols] f32, importances [cols] f32; q's scales and codes are written
// Geometry: 32 threads a group, 8 groups a block.
// Macros: scheme.cuh. Twin: scheme/fit/power_of_two.rs.
__device__ __forceinline__ float scale_of(int byte) {
    return __uint_as_float(byte > 0 ? (u32)byte << 23 : 0x00400000u);
}

__device__ __forceinline__ float error(float x, float importance, float scale) {
    float units = fabsf(x) * __fdiv_rn(1.0f, scale), difference = units - nearest(units);
    return warp_sum(importance * difference * difference);
}

extern "C" __global__ void __launch_bounds__(256)
    fit_power_of_two(Grids q, const float *target, const float *importances, u32 carry, u32 search, u32 rows) {
    const u32 lane = threadIdx.x;
    const u64 group = (u64)blockIdx.x * 8 + threadIdx.y;
    if (group >= (u64)rows * q.groups) return;
    const float x = target[group * 32 + lane], importance = importances[group % q.groups * 32 + lane];
    const float largest = warp_max(fabsf(x));
    float chosen = scale_of((int)((__float_as_uint(largest) + carry) >> 23) - 2);
    if (search) {
        const float start = chosen, factor = largest > 6.0f * start ? 2.0f : 0.5f;
        float best = INFINITY_F;
        for (int i = 0; i < 3; i++) {
            float candidate = fmaxf(start * (i == 0 ? 1.0f : i == 1 ? factor : 1.0f / factor), scale_of(0));
            float ratio = candidate / start, cost = error(x, importance, candidate) * (ratio * ratio);
            if (cost < best) best = cost, chosen = candidate;
        }
    }
    if (lane == 0) q.scales[group] = chosen;
    // Adding zero makes -0 the plain zero.
    q.codes[group * 32 + lane] = code_of(nearest(x * __fdiv_rn(1.0f, chosen) + 0.0f));
}
