// gather: y[i, :] = x[rows[i], :], copied as bytes
//   x, y  [*, row_bytes]     16-byte aligned rows
//   rows  u32 [n]
// needs row_bytes % 16 == 0.  grid n, block 128.
// Twin: backend/cpu.rs select_rows. Agrees bit for bit.
extern "C" __global__ void __launch_bounds__(128)
gather(const uint4 *__restrict__ x, const u32 *__restrict__ rows, uint4 *__restrict__ y, u32 row_bytes) {
    u32 width = row_bytes / 16;
    const uint4 *from = x + (u64)rows[blockIdx.x] * width;
    uint4 *to = y + (u64)blockIdx.x * width;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}
