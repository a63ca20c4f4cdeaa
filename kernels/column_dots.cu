// column_dots: sums[j] = Σ a[i, j] · b[i, j]
//   a, b  f32 [rows, cols]
//   sums  f32 [cols]
// grid ceil(cols / 32), block (32, 32): a column a lane, each 32nd row a warp, merged in a fixed order.
// Twin: backend/cpu/gradients.rs gain_gradient.
extern "C" __global__ void __launch_bounds__(1024)
column_dots(const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ sums, u32 rows, u32 cols) {
    __shared__ float parts[32][33];
    u32 column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < cols)
        for (u32 row = threadIdx.y; row < rows; row += 32) sum += a[(u64)row * cols + column] * b[(u64)row * cols + column];
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    float total = warp_sum(parts[threadIdx.x][threadIdx.y]);
    column = blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x == 0 && column < cols) sums[column] = total;
}
