// sums[i] = Σ a[i, j] · b[i, j] over j, in F64.
//   a, b [rows, cols] f32, sums [rows] f64
// Geometry: a block of 256 threads a row.
// Twin: method/solve.rs energy.
extern "C" __global__ void __launch_bounds__(256)
    row_dots(const float *a, const float *b, double *sums, u32 cols) {
    __shared__ double scratch[8];
    u64 start = (u64)blockIdx.x * cols;
    double sum = 0.0;
    for (u32 j = threadIdx.x; j < cols; j += 256) sum += (double)a[start + j] * (double)b[start + j];
    for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < 8; warp++) sum += scratch[warp];
        sums[blockIdx.x] = sum;
    }
}
