// rope: rotates every head in place by its token's position, Hugging Face arrangement: element i of a head's first half
// pairs with element i of its second half.
//   x            X [n, heads · 2 · half]     X is float, f16 or bf16; F32 arithmetic, rounded once
//   frequencies  f32 [half]                  angle per position, passed by value
//   position = row % tokens + first
// A value past X's range becomes NaN, not infinite: a key of minus infinity would drop out of the softmax unseen.
// needs half % 4 == 0, half <= 128.  grid n, block 256: four pairs a thread.
// Twin: backend/cpu.rs rope.
struct Frequencies {
    float per_position[128];
};
extern "C" __global__ void __launch_bounds__(256)
rope(X *__restrict__ x, const __grid_constant__ Frequencies frequencies, u32 heads, u32 half, u32 tokens, u32 first) {
    float position = (float)(blockIdx.x % tokens + first);
    x += (u64)blockIdx.x * heads * 2 * half;
    for (u32 at = 4 * threadIdx.x; at < heads * half; at += 4 * blockDim.x) {
        u32 head = at / half, i = at % half;
        X *low = x + head * 2 * half + i, *high = low + half;
        float a[4], b[4];
        load4(low, a);
        load4(high, b);
        for (int j = 0; j < 4; j++) {
            float sine, cosine;
            sincosf(__fmul_rn(position, frequencies.per_position[i + j]), &sine, &cosine);
            float rotated = a[j] * cosine - b[j] * sine;
            b[j] = b[j] * cosine + a[j] * sine;
            a[j] = rotated;
        }
        for (int j = 0; j < 4; j++) a[j] = within<X>(a[j]), b[j] = within<X>(b[j]);
        store4(low, a);
        store4(high, b);
    }
}
