// draw: replaces the most likely token by one drawn from softmax(logits / temperature), restricted to what top-p keeps
//   weights    u32 [batch, vocab]      from nucleus.cu
//   ids        u32 [batch]             the drawn token is written
//   positions  u32 [batch]             where it will stand
//   history    u32 [batch, capacity]   history[i, positions[i]]; written
//   draws      Draw [batch]            texts that take the most likely token are left out
//   nuclei     Nucleus [batch]         the threshold, from nucleus.cu
//   sums       u64 [batch, 32 · gridDim.x]  each warp's sum of kept weights
//   arrived    u32 [batch]             zero; left zero
// The token is the first at which the running sum of kept weights, by id, passes random · their sum. Each warp sums a run of
// ids; the last block of a sequence to arrive finds the warp's run, then the token in it.
// grid (up to 32, batch), block 1024.
// Twin: generate/sampling.rs Draw::choose.

extern "C" __global__ void __launch_bounds__(1024)
draw(const u32 *__restrict__ weights, u32 *__restrict__ ids, const u32 *__restrict__ positions, u32 *__restrict__ history,
     const Draw *__restrict__ draws, const Nucleus *__restrict__ nuclei, u64 *sums, u32 *arrived, u32 vocab, u32 capacity) {
    __shared__ u64 kept, left;
    __shared__ u32 run;
    let_successor_start();
    wait_for_predecessor();
    u32 sequence = blockIdx.y, warps = 32 * gridDim.x, lane = threadIdx.x % 32;
    Draw draw = draws[sequence];
    if (draw.inverse_temperature == 0.0f) return;
    weights += (u64)sequence * vocab;
    sums += sequence * warps;
    const u32 threshold = nuclei[sequence].threshold;
    auto kept_weight = [&](u32 i) { return weights[i] >= threshold ? weights[i] : 0; };

    const u32 run_ids = ((vocab + warps - 1) / warps + 31) / 32 * 32;
    u32 warp = blockIdx.x * 32 + threadIdx.x / 32;
    u64 sum = 0;
#pragma unroll 4
    for (u32 i = warp * run_ids + lane; i < min((warp + 1) * run_ids, vocab); i += 32) sum += kept_weight(i);
    sum = running_sum_of_warp(sum);
    if (lane == 31) __stcg(sums + warp, sum);
    if (!is_last_to_arrive(arrived + sequence)) return;

    u64 own = threadIdx.x < warps ? __ldcg(sums + threadIdx.x) : 0, upto = running_sum(own);
    if (threadIdx.x == 1023) kept = upto;
    __syncthreads();
    const u32 position = positions[sequence];
    u64 target = __umul64hi(random_at(draw.stream, position), kept);
    if (upto > target && upto - own <= target) run = threadIdx.x, left = target - (upto - own);
    __syncthreads();
    // Without any weight, which nucleus.cu reports, the token stays.
    if (threadIdx.x >= 32 || kept == 0) return;
    u64 before = 0;
    for (u32 first = run * run_ids;; first += 32) {
        u64 upto_lane = before + running_sum_of_warp(first + lane < vocab ? kept_weight(first + lane) : 0);
        u32 past = __ballot_sync(~0u, upto_lane > left);
        if (past == 0) {
            before = __shfl_sync(~0u, upto_lane, 31);
            continue;
        }
        if (lane == 0) {
            u32 id = first + __ffs(past) - 1;
            ids[sequence] = id;
            if (position < capacity) history[(u64)sequence * capacity + position] = id;
        }
        return;
    }
}
