// dequantize: y[r, c] = scale · element[code[r, c]] + offset, exact in F32; as f16 or bf16 rounded once.
//   w      Weight         packed planes and stored scales, see decode.cuh
//   y      Y [rows, cols]     Y is float, f16 or bf16
//   units  rows · pitch / 8
// needs cols % 8 == 0, rows · pitch < 2^32.  grid ceil(units / 1024), block 256: four stored units a thread, one block
// width apart, so that loads and stores of a warp are contiguous and four loads are in flight.
// Twin: scheme/qtensor.rs decode. F32 agrees bit for bit.
extern "C" __global__ void __launch_bounds__(256) dequantize(Weight w, Y *__restrict__ y, u32 units) {
    u32 first = blockIdx.x * 1024 + threadIdx.x;
#pragma unroll
    for (int step = 0; step < 4; step++) {
        u32 unit = first + 256 * step;
        if (unit >= units) return;
        float x[8];
        decode_unit(w, unit, x);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 at = first_of(unit, half);
            if (w.pitch != w.cols) {
                u32 row = at / w.pitch, column = at % w.pitch;
                if (column >= w.cols) continue;
                at = row * w.cols + column;
            }
#if !PLAIN && GROUP == 16
            store4(y + at, x + 4 * half);
#else
            if (half == 0) store8(y + at, x);
#endif
        }
    }
}
