// How keys and values are kept: KV is EXACT, BF16, FP8 or INT8; RUN values share a scale under INT8, which SCALE_BITS (32
// or 16) stores. Twin: model/kv_cache.rs KvCache::round.
#define EXACT 0
#define BF16 1
#define FP8 2
#define INT8 3

// Returns the nearest E4M3 value, ties to even, saturating at 448: adding 1.5 · 2^23 spacings makes the last place of the
// sum one spacing, so the addition itself rounds.
__device__ __forceinline__ float nearest_e4m3(float x) {
    float a = fabsf(x);
    float binade = __uint_as_float(__float_as_uint(fmaxf(a, 1.0f / 64.0f)) & 0x7f800000u);
    float magic = binade * (1.5f * (1 << 20));
    return copysignf(fminf(__fsub_rn(__fadd_rn(a, magic), magic), 448.0f), x);
}

// A warp rounds one run in place. `scale` is the layer's, which only FP8 has.
template <class T> __device__ __forceinline__ void round_run(T *run, float scale) {
    u32 lane = threadIdx.x % 32;
#if KV == BF16
    for (u32 i = lane; i < RUN; i += 32) store(run + i, low_bf16(pack_bf16(to_float(run[i]), 0.0f)));
#elif KV == FP8
    for (u32 i = lane; i < RUN; i += 32)
        store(run + i, __fmul_rn(nearest_e4m3(__fdiv_rn(to_float(run[i]), scale)), scale));
#elif KV == INT8
    float amax = 0.0f;
    for (u32 i = lane; i < RUN; i += 32) amax = fmaxf(amax, fabsf(to_float(run[i])));
    float step = __fdiv_rn(warp_max(amax), 127.0f), inverse = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
    float kept = SCALE_BITS == 16 ? half_to_float((u16)pack_f16(step, 0.0f)) : step;
    for (u32 i = lane; i < RUN; i += 32) {
        // Ties away from zero, as both engines do.
        float code = roundf(__fmul_rn(to_float(run[i]), inverse));
        store(run + i, __fmul_rn(fminf(fmaxf(code, -127.0f), 127.0f), kept));
    }
#endif
}
