// target += correction, rounded to F32 first.
//   target [count] f32, correction [count] f64
// Geometry: flat, 256 threads.
// Twin: method/mismatch.rs correct.
extern "C" __global__ void __launch_bounds__(256) correct(float *target, const double *correction, u64 count) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < count) target[i] += (float)correction[i];
}
