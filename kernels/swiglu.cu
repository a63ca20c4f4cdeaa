// swiglu: y = silu(gate) · up, silu(g) = g / (1 + e^-g)
//   gate, up, y  X [count]     X is float, f16 or bf16; F32 arithmetic, rounded once
// needs count % 8 == 0.  grid ceil(count / 2048), block 256: eight values a thread.
// Twin: backend/cpu.rs swiglu.
extern "C" __global__ void __launch_bounds__(256)
swiglu(const X *__restrict__ gate, const X *__restrict__ up, X *__restrict__ y, u64 count) {
    u64 at = 8 * ((u64)blockIdx.x * 256 + threadIdx.x);
    if (at >= count) return;
    float g[8], u[8];
    load8(gate + at, g);
    load8(up + at, u);
    for (int j = 0; j < 8; j++) g[j] = g[j] / (1.0f + __expf(-g[j])) * u[j];
    store8(y + at, g);
}
