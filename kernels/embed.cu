// embed: y[i, :] = table[ids[i], :]
//   w    Weight [vocab, cols]     as decode.cuh
//   ids  u32 [n]                  below vocab
//   y    f32 [n, cols]
// needs cols % 8 == 0.  grid n, block 256.
// Twin: backend/cpu.rs embed. Agrees bit for bit.
extern "C" __global__ void __launch_bounds__(256) embed(Weight w, const u32 *__restrict__ ids, float *__restrict__ y) {
    let_successor_start();
    wait_for_predecessor();
    u32 units = w.pitch / 8, row = ids[blockIdx.x];
    y += (u64)blockIdx.x * w.cols;
    for (u32 unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float x[8];
        decode_unit(w, row * units + unit, x);
        for (int half = 0; half < 2; half++) {
            u32 column = first_of(row * units + unit, half) - row * w.pitch;
            if (column < w.cols) store4(y + column, x + 4 * half);
        }
    }
}
