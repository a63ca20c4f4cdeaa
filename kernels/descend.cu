// One pass of coordinate descent over the `width` <= 128 columns from `start` on, which hold whole groups:
//   PART=CODES   re-rounds one code after another, given all others
//   PART=SCALES  tries other stored scales and offsets for one group after another, its codes re-solved under each
// Whatever lowers tr Δ H Δᵀ is kept. Changes of values go to `changes`; the caller adds changes · H to the gradient.
//   gradient [rows, cols] = H (values - target), not written; hessian [cols, cols], damped
//   changes [rows, pitch], written from column `at` on
// Geometry: 32 threads a row, blockDim.y rows a block; 64 KiB of dynamic shared memory. Lane l has columns l + 32 i.
// Macros: scheme.cuh, PART. Twin: method/descent.rs sweep_codes, improve_scale; method/refit.rs.
#define CODES 0
#define SCALES 1

struct Columns {
    float unit[4], value[4], gradient[4], flatness[4]; // 1 / H[k, k]
};

__device__ __forceinline__ bool lowers(float step, float gradient, float curvature) {
    return step != 0.0f && step * (2.0f * gradient + step * curvature) < 0.0f;
}

#if PART == CODES
__device__ __forceinline__ void improve(const Grids &q, u32 row, u32 start, u32 width, const float *h, Columns &c) {
    const u32 lane = threadIdx.x;
    Grid grid[4];
#pragma unroll
    for (int i = 0; i < 4; i++) grid[i] = grid_at(q, row, GROUP_OF(start + min(lane + 32 * i, width - 1)));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        for (u32 l = 0; l < 32 && 32 * i + l < width; l++) {
            const float *line = h + (32 * i + l) * 128;
            float unit = nearest((c.value[i] - c.gradient[i] * c.flatness[i] - grid[i].offset) * grid[i].inverse);
            float value = value_of(grid[i], unit), step = value - c.value[i];
            bool kept = lowers(step, c.gradient[i], line[32 * i + l]);
            if (lane == l && kept) c.unit[i] = unit, c.value[i] = value;
            step = __shfl_sync(~0u, kept ? step : 0.0f, l);
            if (step == 0.0f) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) c.gradient[j] = __fmaf_rn(step, line[lane + 32 * j], c.gradient[j]);
        }
    }
}
#elif PART == SCALES
// Registers a group takes, and lanes.
#define SPAN (GROUP < 32 ? 1 : GROUP / 32)
#define LANES (GROUP < 32 ? GROUP : 32)

__device__ __forceinline__ double warp_sum(double x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

// Writes the stored pair number `index` worth trying, of which there are at most five; false if it is none.
struct Candidates {
    float scale[5], offset[5];
};

__device__ __forceinline__ void neighbours(float scale, float &below, float &above) {
#if SCALE == CODEC_E8M0
    below = 0.5f * scale, above = 2.0f * scale;
#elif SCALE == CODEC_E4M3
    u32 byte = e4m3_of(scale);
    below = e4m3_to_float(byte == 0 ? 0 : byte - 1), above = e4m3_to_float(min(byte + 1, 0x7eu));
#elif SCALE == CODEC_U4 || SCALE == CODEC_U6 || SCALE == CODEC_I6 || SCALE == CODEC_I8
    below = scale - 1.0f, above = scale + 1.0f;
#else
#if ELEMENT == INT
    const float step = 0.5f / (float)(1 << (BITS - 1));
#elif ELEMENT == UINT
    const float step = 0.5f / (float)((1 << BITS) - 1);
#elif ELEMENT == TABLE
    constexpr i8 values[] = {TABLE_VALUES};
    const float step = 0.5f / fmaxf((float)values[TABLE_COUNT - 1], -(float)values[0]);
#elif ELEMENT == E2M1
    const float step = 0.5f / 6.0f;
#else
    const float step = 0.5f / 448.0f;
#endif
    below = scale * (1.0f - step), above = scale * (1.0f + step);
#endif
}

// Sums of method/refit.rs Normal over a group; all lanes get them.
struct Normal {
    double cc, cu, uu, cg, ug;
};

__device__ __forceinline__ float2 solve(const Normal &n, bool fixed_offset) {
    double determinant = n.cc * n.uu - n.cu * n.cu;
    if (!fixed_offset && determinant > 1e-6 * n.cc * n.uu)
        return make_float2((float)((n.cu * n.ug - n.uu * n.cg) / determinant),
                           (float)((n.cu * n.cg - n.cc * n.ug) / determinant));
    return make_float2(n.cc > 0.0 ? (float)(-n.cg / n.cc) : 0.0f, 0.0f);
}

// The group in registers first .. first + SPAN, lanes from `low` on.
template <int first> __device__ __forceinline__ Normal
normal_equations(u32 low, const float *h, const Columns &c) {
    const u32 lane = threadIdx.x;
    float with_units[SPAN] = {}, with_ones[SPAN] = {};
#pragma unroll
    for (int i = 0; i < SPAN; i++) {
        for (u32 l = low; l < low + LANES; l++) {
            float unit = __shfl_sync(~0u, c.unit[first + i], l);
            const float *line = h + (32 * (first + i) + l) * 128 + lane;
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                with_units[j] += line[32 * (first + j)] * unit;
                with_ones[j] += line[32 * (first + j)];
            }
        }
    }
    Normal n = {};
    if (lane - low < LANES) {
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
            double unit = c.unit[first + i], gradient = c.gradient[first + i];
            n.cc += unit * with_units[i], n.cu += with_units[i], n.uu += with_ones[i];
            n.cg += unit * gradient, n.ug += gradient;
        }
    }
    n.cc = warp_sum(n.cc), n.cu = warp_sum(n.cu), n.uu = warp_sum(n.uu);
    n.cg = warp_sum(n.cg), n.ug = warp_sum(n.ug);
    return n;
}

struct Trial {
    float unit[SPAN], value[SPAN];
    double change;
};

// The group's codes re-solved on `grid`: nearest to the present values, then two sweeps within the group.
template <int first> __device__ __forceinline__ Trial
resolve(u32 low, const float *h, const Columns &c, const Grid &grid) {
    const u32 lane = threadIdx.x;
    Trial t;
    float gradient[SPAN], delta[SPAN];
#pragma unroll
    for (int i = 0; i < SPAN; i++) {
        t.unit[i] = nearest((c.value[first + i] - grid.offset) * grid.inverse);
        t.value[i] = value_of(grid, t.unit[i]);
        delta[i] = t.value[i] - c.value[first + i];
        gradient[i] = c.gradient[first + i];
    }
#pragma unroll
    for (int i = 0; i < SPAN; i++) {
        for (u32 l = low; l < low + LANES; l++) {
            float step = __shfl_sync(~0u, delta[i], l);
            const float *line = h + (32 * (first + i) + l) * 128 + lane;
#pragma unroll
            for (int j = 0; j < SPAN; j++) gradient[j] = __fmaf_rn(step, line[32 * (first + j)], gradient[j]);
        }
    }
    for (int sweep = 0; sweep < 2; sweep++) {
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
            for (u32 l = low; l < low + LANES; l++) {
                const float *line = h + (32 * (first + i) + l) * 128;
                float wanted = t.value[i] - gradient[i] * c.flatness[first + i];
                float unit = nearest((wanted - grid.offset) * grid.inverse);
                float value = value_of(grid, unit), step = value - t.value[i];
                bool kept = lowers(step, gradient[i], line[32 * (first + i) + l]);
                if (lane == l && kept) t.unit[i] = unit, t.value[i] = value;
                step = __shfl_sync(~0u, kept ? step : 0.0f, l);
                if (step == 0.0f) continue;
#pragma unroll
                for (int j = 0; j < SPAN; j++)
                    gradient[j] = __fmaf_rn(step, line[lane + 32 * (first + j)], gradient[j]);
            }
        }
    }
    // The change is 2 d·g + dᵀHd = d · (g before + g after).
    double change = 0.0;
    if (lane - low < LANES) {
#pragma unroll
        for (int i = 0; i < SPAN; i++)
            change += (double)(t.value[i] - c.value[first + i]) *
                      ((double)c.gradient[first + i] + (double)gradient[i]);
    }
    t.change = warp_sum(change);
    return t;
}

template <int first> __device__ __forceinline__ void
improve_group(const Grids &q, u32 row, u32 group, u32 low, const float *h, Columns &c) {
    const u32 lane = threadIdx.x, at = row * q.groups + group;
    const float2 factors = outer_factors(q, row, group);
    const float scale = q.scales[at], offset = stored_offset(q, row, group);
    float tried_scale[5], tried_offset[5];
    int count = 0;
    auto push = [&](float s, float o) {
        s = round_stored<SCALE>(s);
#if OFFSET == NONE
        o = 0.0f;
#else
        o = round_stored<OFFSET_CODEC>(o);
#endif
        bool fresh = s != 0.0f && !(s == scale && o == offset);
        for (int i = 0; i < count; i++) fresh = fresh && !(s == tried_scale[i] && o == tried_offset[i]);
        if (fresh) tried_scale[count] = s, tried_offset[count] = o, count++;
    };
#if SCALE != CODEC_E8M0
    if (factors.x != 0.0f) {
        float2 step = solve(normal_equations<first>(low, h, c), OFFSET == NONE || factors.y == 0.0f);
        push(scale + step.x / factors.x, offset + (factors.y == 0.0f ? 0.0f : step.y / factors.y));
    }
#endif
    float below, above;
    neighbours(scale, below, above);
    push(below, offset), push(above, offset);
#if OFFSET == SUBTRACTED
    push(scale, offset - 1.0f), push(scale, offset + 1.0f);
#endif
    int chosen = -1;
    Trial best;
    best.change = 0.0;
    for (int i = 0; i < count; i++) {
        Trial trial = resolve<first>(low, h, c, effective(factors, tried_scale[i], tried_offset[i]));
        if (trial.change < best.change) best = trial, chosen = i;
    }
    if (chosen < 0) return;
    if (lane == 0) {
        q.scales[at] = tried_scale[chosen];
#if OFFSET != NONE
        q.offsets[at] = tried_offset[chosen];
#endif
    }
    // Decoded again, so that values are exactly what the codes mean.
    const Grid grid = effective(factors, tried_scale[chosen], tried_offset[chosen]);
    const bool mine = lane - low < LANES;
#pragma unroll
    for (int i = 0; i < SPAN; i++) {
        float value = value_of(grid, best.unit[i]), step = mine ? value - c.value[first + i] : 0.0f;
        if (mine) c.unit[first + i] = best.unit[i], c.value[first + i] = value;
        for (u32 l = low; l < low + LANES; l++) {
            float moved = __shfl_sync(~0u, step, l);
            if (moved == 0.0f) continue;
            const float *line = h + (32 * (first + i) + l) * 128 + lane;
#pragma unroll
            for (int j = 0; j < 4; j++) c.gradient[j] = __fmaf_rn(moved, line[32 * j], c.gradient[j]);
        }
    }
}

__device__ __forceinline__ void improve(const Grids &q, u32 row, u32 start, u32 width, const float *h, Columns &c) {
#define IMPROVE(first)                                                                                                 \
    if (first < 4 && first % SPAN == 0 && 32 * first < width)                                                          \
        for (u32 low = 0; low < 32 && 32 * first + low < width; low += LANES)                                          \
            improve_group<(first < 4 && first % SPAN == 0 ? first : 0)>(q, row, (start + 32 * first + low) / GROUP,    \
                                                                        low, h, c);
    IMPROVE(0) IMPROVE(1) IMPROVE(2) IMPROVE(3)
}
#endif

extern "C" __global__ void __launch_bounds__(512)
    descend(Grids q, const float *gradient, const float *hessian, float *changes, u32 rows, u32 start, u32 width,
            u32 pitch, u32 at) {
    extern __shared__ float block[]; // [128, 128]
    const u32 lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
    for (u32 i = threadIdx.y * 32 + lane; i < 128 * 128; i += 32 * blockDim.y) {
        u32 j = i / 128, k = i % 128;
        block[i] = j < width && k < width ? hessian[(u64)(start + j) * q.cols + start + k] : 0.0f;
    }
    __syncthreads();
    if (row >= rows) return;
    const u64 first = (u64)row * q.cols + start;
    Columns c;
    float before[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 k = lane + 32 * i;
        bool inside = k < width;
        u64 from = first + (inside ? k : 0);
        c.unit[i] = unit_of(q.codes[from]);
        c.value[i] = value_of(grid_at(q, row, GROUP_OF(start + (inside ? k : 0))), c.unit[i]);
        c.gradient[i] = gradient[from];
        c.flatness[i] = inside ? 1.0f / block[k * 129] : 0.0f;
        before[i] = c.value[i];
    }
    improve(q, row, start, width, block, c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 k = lane + 32 * i;
        if (k >= width) continue;
        q.codes[first + k] = code_of(c.unit[i]);
        changes[(u64)row * pitch + at + k] = c.value[i] - before[i];
    }
}
