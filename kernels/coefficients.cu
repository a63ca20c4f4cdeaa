// a[j, k] = L[c(j), c(k)] / L[c(k), c(k)] for j < k, else 0, with c(i) = cols - 1 - i: the feedback coefficients of GPTQ from
// the lower factor of the reversed Hessian.
//   a [cols, cols] f32, lower [cols, cols] f64
// Geometry: flat blocks of 256 threads along a row (x), rows in steps of the grid (y).
// Twin: method/gptq.rs Feedback::new.
extern "C" __global__ void __launch_bounds__(256) coefficients(float *a, const double *lower, u32 cols) {
    u32 k = blockIdx.x * 256 + threadIdx.x;
    if (k >= cols) return;
    u64 col = cols - 1 - k;
    double pivot = lower[col * cols + col];
    for (u32 j = blockIdx.y; j < cols; j += gridDim.y)
        a[(u64)j * cols + k] = j < k ? (float)(lower[(u64)(cols - 1 - j) * cols + col] / pivot) : 0.0f;
}
