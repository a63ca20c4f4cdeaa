// append: rotates queries in place and adds one position to the cache: rotated keys, and values
//   q            bf16 [batch, heads · D]
//   k, v         bf16 [batch, kv_heads · D]
//   k_cache, v_cache  bf16 [batch, capacity, kv_heads · D]
//   positions    u32 [batch]     where each sequence is; below capacity
//   frequencies  f32 [half]      angle per position, passed by value
// D = 2 · half, half % 4 == 0, half <= 128.  grid batch, block 256: four pairs a thread. Rounds as rope does.
// Twin: rope.cu on q and k, then a copy.
struct Frequencies {
    float per_position[128];
};

// Rotates four pairs of a head and writes them to `to`.
__device__ __forceinline__ void rotate(const bf16 *from, bf16 *to, u32 i, u32 half, float position,
                                       const Frequencies &frequencies) {
    float a[4], b[4];
    load4(from + i, a);
    load4(from + i + half, b);
    for (int j = 0; j < 4; j++) {
        float sine, cosine;
        sincosf(__fmul_rn(position, frequencies.per_position[i + j]), &sine, &cosine);
        float rotated = a[j] * cosine - b[j] * sine;
        b[j] = b[j] * cosine + a[j] * sine;
        a[j] = rotated;
    }
    store4(to + i, a);
    store4(to + i + half, b);
}

extern "C" __global__ void __launch_bounds__(256)
append(bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, bf16 *__restrict__ k_cache,
       bf16 *__restrict__ v_cache, const u32 *__restrict__ positions, const __grid_constant__ Frequencies frequencies,
       u32 heads, u32 kv_heads, u32 half, u32 capacity) {
    let_successor_start();
    wait_for_predecessor();
    u32 sequence = blockIdx.x, position = positions[sequence], width = kv_heads * 2 * half;
    u64 row = ((u64)sequence * capacity + position) * width;
    q += (u64)sequence * heads * 2 * half;
    k += (u64)sequence * width;
    v += (u64)sequence * width;
    for (u32 at = 4 * threadIdx.x; at < (heads + kv_heads) * half; at += 4 * blockDim.x) {
        u32 head = at / half, i = at % half;
        if (head < heads) {
            rotate(q + head * 2 * half, q + head * 2 * half, i, half, (float)position, frequencies);
        } else {
            u32 from = (head - heads) * 2 * half;
            rotate(k + from, k_cache + row + from, i, half, (float)position, frequencies);
        }
    }
    for (u32 at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x)
        *(uint4 *)(v_cache + row + at) = *(const uint4 *)(v + at);
}
