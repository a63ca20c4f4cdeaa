// round_cache: rounds keys or values in place as a cache keeps them (cache.cuh)
//   x      X [runs, RUN]     X is float or f16
//   scale  the layer's, which only FP8 has
// A warp a run.  grid ceil(runs / 8), block 256.
// Twin: model/kv_cache.rs KvCache::round.
extern "C" __global__ void __launch_bounds__(256) round_cache(X *__restrict__ x, u64 runs, float scale) {
    u64 run = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (run < runs) round_run(x + run * RUN, scale);
}
