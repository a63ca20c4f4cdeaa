// attend: attention of one new position a sequence: norms (if there are gains) and rotates its query heads and key, puts
// key and value into the cache, and mixes the cached values: softmax(scale · q kᵀ) v
//   q                 f16 [batch, heads · D]
//   k, v              f16 [batch, kv_heads · D]
//   q_gain, k_gain    f32 [D] or null
//   sinks             f32 [heads], with SINKS: exp(sink) joins a head's denominator, unscaled
//   k_cache, v_cache  f16 [batch, capacity, kv_heads · D]
//   positions         u32 [batch]     the new position; it sees 0 ..= position, at most `window` of them; sequences whose
//                                     position is past the cache are left out
//   frequencies       f32 [ROTARY / 2]  angle per position, passed by value; cosines and sines are multiplied with `magnitude`
//   partial           f32 [batch, heads / HEADS, splits, HEADS, D + 2], for splits > 1
//   arrived           u32 [batch, heads / HEADS], zero; left zero
//   out               f16 [batch, heads · D]
// Rounds where the forward pass does: after the norm, after the rotation, and key and value as the cache keeps them
// (cache.cuh; RUN divides D); the rest is F32, rounded once.
// Positions are dealt to `splits` blocks; the last to arrive merges them, in a fixed order. LANES lanes share a key; a lane
// holds 8 columns of HEADS queries that read the same keys.
// The first ROTARY values of a head turn, in pairs (i, i + ROTARY / 2), with NEIGHBOURS (2i, 2i + 1).
// D % 16 == 0, D <= 256, ROTARY % 2 == 0, ROTARY <= D, HEADS divides heads / kv_heads, HEADS <= 4.  grid (heads / HEADS, batch, splits), block 256,
// splits <= 64.
// Twins: rms_norm.cu, rope.cu, round_cache.cu, attention.cu for the last position.
#define LANES (D <= 64 ? 8 : D <= 128 ? 16 : 32)
#define WARPS 8
#define SLOTS (WARPS * 32 / LANES) // keys a block takes at a time
#define PAIRS ((D / 2 + 31) / 32)
#define MAX_SPLITS 64

struct Frequencies {
    float per_position[128];
};

__device__ __forceinline__ float rounded(float x) { return half_to_float((u16)pack_f16(x, 0.0f)); }

// Pairs of a head: those that turn, then those that stay, in neighbours.
__device__ __forceinline__ u32 first_of(u32 i) { return NEIGHBOURS || i >= ROTARY / 2 ? 2 * i : i; }
__device__ __forceinline__ u32 second_of(u32 i) { return NEIGHBOURS || i >= ROTARY / 2 ? 2 * i + 1 : i + ROTARY / 2; }

// A warp norms and rotates one head; a lane ends up with pairs lane, lane + 32, .. in a and b.
__device__ __forceinline__ void turn(const f16 *from, const float *gain, float position, const Frequencies &frequencies,
                                     float magnitude, float eps, float a[PAIRS], float b[PAIRS]) {
    u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        u32 i = lane + 32 * j;
        a[j] = i < D / 2 ? to_float(from[first_of(i)]) : 0.0f, b[j] = i < D / 2 ? to_float(from[second_of(i)]) : 0.0f;
        sum += a[j] * a[j] + b[j] * b[j];
    }
    float factor = gain ? 1.0f / sqrtf(warp_sum(sum) / (float)D + eps) : 1.0f;
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        u32 i = min(lane + 32 * j, D / 2 - 1);
        if (gain) a[j] = rounded(a[j] * factor * gain[first_of(i)]), b[j] = rounded(b[j] * factor * gain[second_of(i)]);
        float sine = 0.0f, cosine = 1.0f;
        if (i < ROTARY / 2) {
            sincosf(__fmul_rn(position, frequencies.per_position[i]), &sine, &cosine);
            sine *= magnitude, cosine *= magnitude;
        }
        float turned = within<f16>(a[j] * cosine - b[j] * sine);
        b[j] = within<f16>(b[j] * cosine + a[j] * sine);
        a[j] = turned;
    }
}

// Returns a head's denominator, of scores less `most`, with its sink: infinite where that is far above all scores.
__device__ __forceinline__ float with_sink(float total, const float *sinks, u32 head, float most) {
#if SINKS
    total += expf(sinks[head] - most);
#endif
    return total;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
attend(const f16 *__restrict__ q, const f16 *__restrict__ k, const f16 *__restrict__ v, const float *__restrict__ q_gain,
       const float *__restrict__ k_gain, const float *__restrict__ sinks, f16 *k_cache, f16 *v_cache,
       const u32 *__restrict__ positions, const __grid_constant__ Frequencies frequencies, float *partial, u32 *arrived,
       f16 *__restrict__ out, u32 heads, u32 kv_heads, u32 capacity, u32 window, float scale, float magnitude, float eps,
       float k_scale, float v_scale) {
    __shared__ float parts[WARPS][HEADS][D], largest_of[WARPS][HEADS], sum_of[WARPS][HEADS];
    __shared__ __align__(16) float queries[HEADS][D];
    __shared__ __align__(16) f16 new_key[D], new_value[D];
    __shared__ float share_of[MAX_SPLITS * HEADS];
    __shared__ bool is_last;
    let_successor_start();
    wait_for_predecessor();
    u32 first_head = blockIdx.x * HEADS, sequence = blockIdx.y, share = heads / kv_heads, kv_head = first_head / share;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, slot = lane / LANES, column = lane % LANES * 8;
    const bool holds = D == 8 * LANES || column < D; // other lanes hold zeros
    u32 position = positions[sequence], row = kv_heads * D;
    if (position >= capacity) return;
    u64 start = (u64)sequence * capacity * row + kv_head * D;
    k_cache += start;
    v_cache += start;
    q += ((u64)sequence * heads + first_head) * D;
    k += (u64)sequence * row + kv_head * D;
    v += (u64)sequence * row + kv_head * D;

    // This block's positions.
    u32 first = position + 1 > window ? position + 1 - window : 0, splits = gridDim.z;
    u32 each = ((position + 1 - first + splits - 1) / splits + SLOTS - 1) / SLOTS * SLOTS;
    u32 begin = first + blockIdx.z * each, end = min(begin + each, position + 1);
    bool has_new = begin <= position && position < end;

    for (u32 head = warp; head <= HEADS; head += WARPS) {
        if (head == HEADS && !has_new) break;
        float a[PAIRS], b[PAIRS];
        turn(head < HEADS ? q + head * D : k, head < HEADS ? q_gain : k_gain, (float)position, frequencies, magnitude, eps,
             a, b);
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            u32 i = lane + 32 * j;
            if (i >= D / 2) break;
            if (head < HEADS) {
                queries[head][first_of(i)] = rounded(a[j]), queries[head][second_of(i)] = rounded(b[j]);
            } else {
                store(new_key + first_of(i), a[j]), store(new_key + second_of(i), b[j]);
                new_value[i] = v[i], new_value[i + D / 2] = v[i + D / 2];
            }
        }
#if KV != EXACT
        if (head == HEADS) {
            __syncwarp();
            for (u32 at = 0; at < D; at += RUN) round_run(new_key + at, k_scale), round_run(new_value + at, v_scale);
        }
#endif
        if (head == HEADS && first_head % share == 0) {
            __syncwarp();
            for (u32 i = lane; i < D; i += 32) {
                k_cache[(u64)position * row + i] = new_key[i];
                v_cache[(u64)position * row + i] = new_value[i];
            }
        }
    }
    __syncthreads();

    float query[HEADS][8], o[HEADS][8] = {}, largest[HEADS], sum[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int c = 0; c < 8; c++) query[h][c] = holds ? queries[h][column + c] : 0.0f;
        largest[h] = -INFINITY_F;
        sum[h] = 0.0f;
    }
    uint4 next_key = make_uint4(0, 0, 0, 0), next_value = next_key;
    // The last key of a block without the newest one must not be read as that.
    u32 mine = warp * (32 / LANES) + slot, last = end > begin ? end - 1 : begin;
    auto load = [&](u32 key) {
        if (!holds) return;
        key = min(key, last);
        next_key = *(const uint4 *)((key == position ? new_key : k_cache + (u64)key * row) + column);
        next_value = *(const uint4 *)((key == position ? new_value : v_cache + (u64)key * row) + column);
    };
    if (begin < end) load(begin + mine);
    for (u32 base = begin; base < end; base += SLOTS) {
        bool inside = base + mine < end;
        float key[8], value[8];
        load8((const f16 *)&next_key, key);
        load8((const f16 *)&next_value, value);
        if (base + SLOTS < end) load(base + SLOTS + mine);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = 0.0f;
#pragma unroll
            for (int c = 0; c < 8; c++) score += query[h][c] * key[c];
#pragma unroll
            for (int lanes = 1; lanes < LANES; lanes *= 2) score += __shfl_xor_sync(~0u, score, lanes);
            score = inside ? score * scale : -INFINITY_F;
            float new_largest = fmaxf(largest[h], score);
            float shift = new_largest == -INFINITY_F ? 0.0f : new_largest;
            float shrink = expf(largest[h] - shift), p = expf(score - shift);
            largest[h] = new_largest;
            sum[h] = sum[h] * shrink + p;
#pragma unroll
            for (int c = 0; c < 8; c++) o[h][c] = o[h][c] * shrink + p * value[c];
        }
    }
    // Merge the keys of a warp, then the warps.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float most = largest[h];
#pragma unroll
        for (int lanes = LANES; lanes < 32; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
        float factor = largest[h] == -INFINITY_F ? 0.0f : expf(largest[h] - most);
        sum[h] *= factor;
#pragma unroll
        for (int c = 0; c < 8; c++) o[h][c] *= factor;
#pragma unroll
        for (int lanes = LANES; lanes < 32; lanes *= 2) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], lanes);
#pragma unroll
            for (int c = 0; c < 8; c++) o[h][c] += __shfl_xor_sync(~0u, o[h][c], lanes);
        }
        if (slot == 0 && holds)
#pragma unroll
            for (int c = 0; c < 8; c++) parts[warp][h][column + c] = o[h][c];
        if (lane == 0) largest_of[warp][h] = most, sum_of[warp][h] = sum[h];
    }
    __syncthreads();
    const u32 ENTRY = HEADS * (D + 2);
    u64 group = (u64)sequence * gridDim.x + blockIdx.x;
    float *own = partial + (group * splits + blockIdx.z) * ENTRY;
    out += ((u64)sequence * heads + first_head) * D;
    // WARPS lanes a head work out what each warp's part counts.
    if (threadIdx.x < WARPS * HEADS) {
        u32 h = threadIdx.x / WARPS, w = threadIdx.x % WARPS, mates = ((1u << WARPS) - 1) << (lane / WARPS * WARPS);
        float its = largest_of[w][h], most = its;
#pragma unroll
        for (int lanes = 1; lanes < WARPS; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(mates, most, lanes));
        float factor = its == -INFINITY_F ? 0.0f : expf(its - most), total = factor * sum_of[w][h];
#pragma unroll
        for (int lanes = 1; lanes < WARPS; lanes *= 2) total += __shfl_xor_sync(mates, total, lanes);
        if (splits == 1) total = with_sink(total, sinks, first_head + h, most);
        sum_of[w][h] = splits == 1 ? factor / total : factor;
        if (splits > 1 && w == 0) own[HEADS * D + 2 * h] = most, own[HEADS * D + 2 * h + 1] = total;
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < HEADS * D; at += 32 * WARPS) {
        u32 h = at / D, c = at % D;
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += sum_of[w][h] * parts[w][h][c];
        if (splits == 1) store(out + at, value);
        else own[at] = value;
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived + group, 1) == splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) arrived[group] = 0;
    const float *all = partial + group * splits * ENTRY;
    // A warp a head: what each split counts.
    if (warp < HEADS) {
        const float *its = all + HEADS * D + 2 * warp;
        float largest_here[MAX_SPLITS / 32], total = 0.0f, most = -INFINITY_F;
#pragma unroll
        for (int j = 0; j < MAX_SPLITS / 32; j++) {
            u32 s = lane + 32 * j;
            largest_here[j] = s < splits ? __ldcg(its + s * ENTRY) : -INFINITY_F;
            most = fmaxf(most, largest_here[j]);
        }
        most = warp_max(most);
#pragma unroll
        for (int j = 0; j < MAX_SPLITS / 32; j++) {
            u32 s = lane + 32 * j;
            largest_here[j] = largest_here[j] == -INFINITY_F ? 0.0f : expf(largest_here[j] - most);
            if (s < splits) total += largest_here[j] * __ldcg(its + s * ENTRY + 1);
        }
        total = with_sink(warp_sum(total), sinks, first_head + warp, most);
#pragma unroll
        for (int j = 0; j < MAX_SPLITS / 32; j++)
            if (lane + 32 * j < splits) share_of[(lane + 32 * j) * HEADS + warp] = largest_here[j] / total;
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < HEADS * D; at += 32 * WARPS) {
        u32 h = at / D;
        float value = 0.0f;
#pragma unroll 8
        for (u32 s = 0; s < splits; s++) {
            float factor = share_of[s * HEADS + h];
            value += factor * __ldcg(all + s * ENTRY + at);
        }
        store(out + at, value);
    }
}
