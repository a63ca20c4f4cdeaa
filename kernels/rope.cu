// rope: rotates the pairs of every head in place by its token's position and multiplies them with `magnitude`
//   x            X [n, heads · head_dim]   X is float, f16 or bf16; F32 arithmetic, rounded once
//   frequencies  f32 [pairs]               angle per position, passed by value
//   position = row % tokens + first
// NEIGHBOURS 0: value i of a head pairs with i + pairs; 1: 2i with 2i + 1. Values from 2 · pairs on stay.
// A value past X's range becomes NaN, not infinite: a key of minus infinity would drop out of the softmax unseen.
// RUN 4, four pairs a thread at once, needs NEIGHBOURS 0, 2 · pairs == head_dim, pairs % 4 == 0; RUN 1 takes any.
// pairs <= 128, head_dim % 2 == 0.  grid n, block 256.
// Twin: backend/cpu/rotation.rs.
struct Frequencies {
    float per_position[128];
};
extern "C" __global__ void __launch_bounds__(256)
rope(X *__restrict__ x, const __grid_constant__ Frequencies frequencies, u32 heads, u32 head_dim, u32 pairs, u32 tokens,
     u32 first, float magnitude) {
    float position = (float)(blockIdx.x % tokens + first);
    x += (u64)blockIdx.x * heads * head_dim;
    auto turn = [&](u32 i, float &a, float &b) {
        float sine, cosine;
        sincosf(__fmul_rn(position, frequencies.per_position[i]), &sine, &cosine);
        sine *= magnitude, cosine *= magnitude;
        float rotated = a * cosine - b * sine;
        b = b * cosine + a * sine;
        a = rotated;
    };
    u32 half = head_dim / 2;
    for (u32 at = RUN * threadIdx.x; at < heads * half; at += RUN * blockDim.x) {
        X *head = x + at / half * head_dim;
        u32 i = at % half;
#if RUN == 4
        X *low = head + i, *high = low + half;
        float a[4], b[4];
        load4(low, a);
        load4(high, b);
        for (int j = 0; j < 4; j++) turn(i + j, a[j], b[j]);
        for (int j = 0; j < 4; j++) a[j] = within<X>(a[j]), b[j] = within<X>(b[j]);
        store4(low, a);
        store4(high, b);
#else
        // Values that stay lie in neighbours.
        bool apart = !NEIGHBOURS && i < pairs;
        X *low = head + (apart ? i : 2 * i), *high = low + (apart ? pairs : 1);
        float a = to_float(*low), b = to_float(*high);
        if (i < pairs) turn(i, a, b);
        store(low, within<X>(a));
        store(high, within<X>(b));
#endif
    }
}
