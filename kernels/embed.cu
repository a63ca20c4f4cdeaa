// embed: y[i, :] = table[ids[i], :]
//   w    Weight [vocab, cols]     as decode.cuh
//   ids  u32 [n]                  below vocab
//   y    f32 [n, cols]
// needs cols % 8 == 0.  grid n, block 128.
// Twin: backend/cpu.rs embed. Agrees bit for bit.
extern "C" __global__ void __launch_bounds__(128) embed(Weight w, const u32 *__restrict__ ids, float *__restrict__ y) {
    let_successor_start();
    wait_for_predecessor();
    u32 units = w.cols / 8;
    for (u32 unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float x[8];
        decode_unit(w, ids[blockIdx.x] * units + unit, x);
        store8(y + 8ull * (blockIdx.x * (u64)units + unit), x);
    }
}
