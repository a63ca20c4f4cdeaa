// add: x += SIGN · y
//   x  f32 [count]     the residual stream
//   y  X [count]       X is float, f16 or bf16; SIGN is 1.0f or -1.0f
// needs count % 8 == 0.  grid ceil(count / 2048), block 256: eight values a thread.
// Twins: backend/cpu add, subtract.
extern "C" __global__ void __launch_bounds__(256) add(float *__restrict__ x, const X *__restrict__ y, u64 count) {
    u64 at = 8 * ((u64)blockIdx.x * 256 + threadIdx.x);
    if (at >= count) return;
    float a[8], b[8];
    load8(x + at, a);
    load8(y + at, b);
    for (int j = 0; j < 8; j++) a[j] += SIGN * b[j];
    store8(x + at, a);
}
