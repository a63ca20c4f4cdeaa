// attention_gradient: between the products of causal attention's derivative, one row of scores a block
//   s       f32 [heads, tokens, pitch]   q · k
//   dp      f32 [heads, tokens, pitch]   gradient of the probabilities
//   sinks   f32 [heads] or null          exp(sink) joins the sum of each row
//   p       Y [heads, tokens, pitch]     softmax(scale · s) over the keys a query sees, 0 elsewhere; Y is float or f16
//   ds      Y [heads, tokens, pitch]     scale · p · (dp - Σ p · dp), 0 elsewhere
// Query i sees keys i - window + 1 ..= i.  grid (tokens, heads), block 128.
// Twin: backend/cpu/gradients.rs probabilities_and_gradient.
extern "C" __global__ void __launch_bounds__(128)
attention_gradient(const float *__restrict__ s, const float *__restrict__ dp, const float *__restrict__ sinks,
                   Y *__restrict__ p, Y *__restrict__ ds, u32 tokens, u32 pitch, u32 window, float scale) {
    __shared__ float scratch[32];
    u32 query = blockIdx.x;
    u64 start = ((u64)blockIdx.y * tokens + query) * pitch;
    s += start, dp += start, p += start, ds += start;
    u32 first = query + 1 > window ? query + 1 - window : 0;
    float largest = -INFINITY_F;
    for (u32 key = first + threadIdx.x; key <= query; key += 128) largest = fmaxf(largest, s[key]);
    largest = block_max(largest, scratch);
    float sum = 0.0f, dot = 0.0f;
    for (u32 key = first + threadIdx.x; key <= query; key += 128) {
        float e = expf((s[key] - largest) * scale);
        sum += e, dot += e * dp[key];
    }
    float sink = sinks ? expf(sinks[blockIdx.y] - largest * scale) : 0.0f;
    float share = 1.0f / (block_sum(sum, scratch) + sink), mean = block_sum(dot, scratch) * share;
    for (u32 key = threadIdx.x; key < pitch; key += 128) {
        bool seen = first <= key && key <= query;
        float own = seen ? expf((s[key] - largest) * scale) * share : 0.0f;
        store(p + key, own);
        store(ds + key, seen ? own * (dp[key] - mean) * scale : 0.0f);
    }
}
