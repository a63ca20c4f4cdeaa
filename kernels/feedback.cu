// GPTQ over `width` <= 128 steps from `start` on: rounds column after column, feeding each error to the later columns of the
// block. Errors are written with their sign reversed, so that the caller feeds them to all later blocks by
// running += errors · a.
//   target [rows, cols] in column order; running [rows, cols] in order of steps: targets less what earlier blocks fed
//   a [cols, cols] of coefficients.cu, order [cols]
//   errors [rows, pitch], written from column `at` on
// Geometry: 32 threads a row, blockDim.y rows a block; 64 KiB of dynamic shared memory. Lane l has steps l + 32 i.
// Macros: scheme.cuh. Twin: method/gptq.rs gptq.
extern "C" __global__ void __launch_bounds__(512)
    feedback(Grids q, const float *target, const float *running, float *errors, const float *a, const u32 *order,
             u32 rows, u32 start, u32 width, u32 pitch, u32 at) {
    extern __shared__ float block[]; // [width, 128]
    const u32 lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
    for (u32 i = threadIdx.y * 32 + lane; i < 128 * width; i += 32 * blockDim.y) {
        u32 j = i / 128, k = i % 128;
        block[i] = k < width ? a[(u64)(start + j) * q.cols + start + k] : 0.0f;
    }
    __syncthreads();
    if (row >= rows) return;
    const u64 first = (u64)row * q.cols;
    float wanted[4], fed[4], unit[4], error[4];
    Grid grid[4];
    u32 column[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 step = start + min(lane + 32 * i, width - 1);
        column[i] = order[step];
        grid[i] = grid_at(q, row, GROUP_OF(column[i]));
        wanted[i] = target[first + column[i]];
        fed[i] = running[first + step];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        for (u32 l = 0; l < 32 && 32 * i + l < width; l++) {
            float u = nearest((fed[i] - grid[i].offset) * grid[i].inverse);
            float e = wanted[i] - value_of(grid[i], u);
            if (lane == l) unit[i] = u, error[i] = e;
            e = __shfl_sync(~0u, e, l);
            const float *coefficients = block + (32 * i + l) * 128 + lane;
#pragma unroll
            for (int j = i; j < 4; j++) fed[j] = __fmaf_rn(e, coefficients[32 * j], fed[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (lane + 32 * i < width) {
            q.codes[first + column[i]] = code_of(unit[i]);
            errors[(u64)row * pitch + at + lane + 32 * i] = error[i];
        }
    }
}
