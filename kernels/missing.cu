// wide = strength · product + residual · drift in F64: what a target misses, before the inverse Hessian.
//   wide [count] f64, product [count] f32, drift [count] f32 or 0
// Geometry: flat, 256 threads.
// Twin: method/mismatch.rs correct.
extern "C" __global__ void __launch_bounds__(256)
    missing(double *wide, const float *product, const float *drift, float strength, float residual, u64 count) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    float x = strength * product[i];
    if (drift) x += residual * drift[i];
    wide[i] = (double)x;
}
