// rms_norm: y = x / sqrt(mean(x²) + eps) · gain over runs of `width` values: a whole row, or each head of a row
//   x     X [runs, width]     X is float (the residual stream), f16 or bf16
//   gain  f32 [width]
//   y     Y [runs, width]     F32 arithmetic, rounded once to Y; may be x
// needs width % 8 == 0.  block (32, 8), one warp a run, grid ceil(runs / 8); for width > 1024 block (256, 1), grid runs.
// Twin: backend/cpu.rs rms_norm.
extern "C" __global__ void __launch_bounds__(256)
rms_norm(const X *x, const float *__restrict__ gain, Y *y, u32 runs, u32 width, float eps) {
    __shared__ float scratch[32];
    let_successor_start();
    for (u32 c = 32 * threadIdx.x; c < width; c += 32 * blockDim.x) asm volatile("prefetch.global.L2 [%0];" :: "l"(gain + c));
    wait_for_predecessor();
    u32 run = blockIdx.x * blockDim.y + threadIdx.y;
    if (run >= runs) return; // a whole warp at a time; blocks of one run never leave here
    x += (u64)run * width;
    y += (u64)run * width;
    float sum = 0.0f, a[8], g[8];
    for (u32 c = 8 * threadIdx.x; c < width; c += 8 * blockDim.x) {
        load8(x + c, a);
        for (int j = 0; j < 8; j++) sum += a[j] * a[j];
    }
    float factor = 1.0f / sqrtf(block_sum(sum, scratch) / (float)width + eps);
    for (u32 c = 8 * threadIdx.x; c < width; c += 8 * blockDim.x) {
        load8(x + c, a);
        load8(gain + c, g);
        for (int j = 0; j < 8; j++) a[j] = a[j] * factor * g[j];
        store8(y + c, a);
    }
}
