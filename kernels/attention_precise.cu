// attention_precise: causal softmax(scale · q kᵀ) v within each sequence, all in F32, for `--precise`
//   q    f32 [sequences · tokens, heads · D]
//   k, v f32 [sequences · tokens, kv_heads · D]
//   sinks f32 [heads], with SINKS: exp(sink) joins the denominator, unscaled
//   out  f32 [sequences · tokens, heads · D]
// One warp a query, D / 32 columns a lane (the last may be empty); keys pass by one at a time. A reference, not fast.
// grid (ceil(tokens / 8), heads, sequences), block 256.
// Twin: backend/cpu.rs attention.
#define COLUMNS ((D + 31) / 32)

extern "C" __global__ void __launch_bounds__(256)
attention_precise(const float *__restrict__ q, const float *__restrict__ k, const float *__restrict__ v,
                  const float *__restrict__ sinks, float *__restrict__ out, u32 tokens, u32 heads, u32 kv_heads,
                  u32 window, float scale) {
    u32 row = blockIdx.x * 8 + threadIdx.x / 32, head = blockIdx.y, lane = threadIdx.x % 32;
    if (row >= tokens) return;
    u64 sequence = (u64)blockIdx.z * tokens, kv_row = kv_heads * D;
    u64 at = (sequence + row) * heads * D + head * D;
    k += sequence * kv_row + head / (heads / kv_heads) * D;
    v += sequence * kv_row + head / (heads / kv_heads) * D;
    float query[COLUMNS], o[COLUMNS] = {}, sum = 0.0f, largest = -INFINITY_F;
    for (int c = 0; c < COLUMNS; c++) query[c] = c * 32 + lane < D ? q[at + c * 32 + lane] : 0.0f;
    for (u32 key = row >= window ? row - window + 1 : 0; key <= row; key++) {
        float score = 0.0f;
        for (int c = 0; c < COLUMNS; c++)
            if (c * 32 + lane < D) score += query[c] * k[key * kv_row + c * 32 + lane];
        score = scale * warp_sum(score);
        float new_largest = fmaxf(largest, score);
        float shrink = expf(largest - new_largest), p = expf(score - new_largest);
        largest = new_largest;
        sum = sum * shrink + p;
        for (int c = 0; c < COLUMNS; c++)
            if (c * 32 + lane < D) o[c] = o[c] * shrink + p * v[key * kv_row + c * 32 + lane];
    }
#if SINKS
    // Far above all scores this is infinite, and every probability 0.
    sum += expf(sinks[head] - largest);
#endif
    for (int c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < D) out[at + c * 32 + lane] = o[c] / sum;
}
