// rms_norm_gradient: with r = (mean(x²) + eps)^-½ over a run: dx = r · gain · dy - x · r³ · mean(x · gain · dy)
//   x       X [runs, width]     X is float or f16
//   gain    f32 [width]
//   dy, dx  f32 [runs, width]
// needs width % 8 == 0.  block (32, 8), one warp a run, grid ceil(runs / 8); for width > 1024 block (256, 1), grid runs.
// Twin: backend/cpu/gradients.rs rms_norm_gradient.
extern "C" __global__ void __launch_bounds__(256)
rms_norm_gradient(const X *__restrict__ x, const float *__restrict__ gain, const float *__restrict__ dy,
                  float *__restrict__ dx, u32 runs, u32 width, float eps) {
    __shared__ float scratch[32];
    u32 run = blockIdx.x * blockDim.y + threadIdx.y;
    if (run >= runs) return; // a whole warp at a time; blocks of one run never leave here
    u64 start = (u64)run * width;
    float squares = 0.0f, dot = 0.0f, a[8], g[8], d[8];
    for (u32 c = 8 * threadIdx.x; c < width; c += 8 * blockDim.x) {
        load8(x + start + c, a);
        load8(gain + c, g);
        load8(dy + start + c, d);
        for (int j = 0; j < 8; j++) squares += a[j] * a[j], dot += a[j] * g[j] * d[j];
    }
    float r = 1.0f / sqrtf(block_sum(squares, scratch) / (float)width + eps);
    float along = r * r * r * block_sum(dot, scratch) / (float)width;
    for (u32 c = 8 * threadIdx.x; c < width; c += 8 * blockDim.x) {
        load8(x + start + c, a);
        load8(gain + c, g);
        load8(dy + start + c, d);
        for (int j = 0; j < 8; j++) d[j] = r * g[j] * d[j] - a[j] * along;
        store8(dx + start + c, d);
    }
}
