// swiglu_gradient: with s = 1 / (1 + e^-gate): dgate = dy · up · s · (1 + gate · (1 - s)), dup = dy · gate · s
//   gate, up          X [count]     X is float or f16
//   dy, dgate, dup    f32 [count]
// needs count % 8 == 0.  grid ceil(count / 2048), block 256: eight values a thread.
// Twin: backend/cpu/gradients.rs swiglu_gradient.
extern "C" __global__ void __launch_bounds__(256)
swiglu_gradient(const X *__restrict__ gate, const X *__restrict__ up, const float *__restrict__ dy,
                float *__restrict__ dgate, float *__restrict__ dup, u64 count) {
    u64 at = 8 * ((u64)blockIdx.x * 256 + threadIdx.x);
    if (at >= count) return;
    float g[8], u[8], d[8];
    load8(gate + at, g);
    load8(up + at, u);
    load8(dy + at, d);
    for (int j = 0; j < 8; j++) {
        float s = 1.0f / (1.0f + expf(-g[j])), own = d[j];
        d[j] = own * g[j] * s;
        g[j] = own * u[j] * s * (1.0f + g[j] * (1.0f - s));
    }
    store8(dgate + at, g);
    store8(dup + at, d);
}
