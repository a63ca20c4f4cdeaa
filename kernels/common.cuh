// Types, conversions and vector access shared by all kernels. Prepended to every source before compilation, so that
// NVRTC needs no include directory: a machine with the driver and NVRTC alone can build everything.
//
// Rounding: every conversion to f16 or bf16 is to nearest even; everything else is F32 (no fast-math flags are used).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
struct bf16 {
    u16 bits;
};

struct f16 {
    u16 bits;
};

#define INFINITY_F __int_as_float(0x7f800000)

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

__device__ __forceinline__ float half_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ __forceinline__ float to_float(f16 x) { return half_to_float(x.bits); }

// Returns two floats as f16, `low` in the low half; past 65504 they become infinite.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Returns two floats as bf16, `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ void store(float *to, float x) { *to = x; }
__device__ __forceinline__ void store(bf16 *to, float x) { to->bits = (u16)pack_bf16(x, 0.0f); }

__device__ __forceinline__ void store(f16 *to, float x) { to->bits = (u16)pack_f16(x, 0.0f); }

// Eight consecutive values; pointers are 16-byte aligned.
__device__ __forceinline__ void load8(const float *from, float x[8]) {
    float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ __forceinline__ void load8(const bf16 *from, float x[8]) {
    uint4 a = *(const uint4 *)from;
    x[0] = low_bf16(a.x), x[1] = high_bf16(a.x), x[2] = low_bf16(a.y), x[3] = high_bf16(a.y);
    x[4] = low_bf16(a.z), x[5] = high_bf16(a.z), x[6] = low_bf16(a.w), x[7] = high_bf16(a.w);
}
__device__ __forceinline__ void load8(const f16 *from, float x[8]) {
    uint4 a = *(const uint4 *)from;
    u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int j = 0; j < 4; j++) x[2 * j] = half_to_float((u16)words[j]), x[2 * j + 1] = half_to_float((u16)(words[j] >> 16));
}
__device__ __forceinline__ void store8(f16 *to, const float x[8]) {
    *(uint4 *)to = make_uint4(pack_f16(x[0], x[1]), pack_f16(x[2], x[3]), pack_f16(x[4], x[5]), pack_f16(x[6], x[7]));
}
__device__ __forceinline__ void store8(float *to, const float x[8]) {
    ((float4 *)to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4 *)to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void store8(bf16 *to, const float x[8]) {
    *(uint4 *)to = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                              pack_bf16(x[6], x[7]));
}

// Four consecutive values; pointers are 8-byte aligned.
__device__ __forceinline__ void load4(const float *from, float x[4]) {
    float4 a = *(const float4 *)from;
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}
__device__ __forceinline__ void load4(const bf16 *from, float x[4]) {
    uint2 a = *(const uint2 *)from;
    x[0] = low_bf16(a.x), x[1] = high_bf16(a.x), x[2] = low_bf16(a.y), x[3] = high_bf16(a.y);
}
__device__ __forceinline__ void load4(const f16 *from, float x[4]) {
    uint2 a = *(const uint2 *)from;
    x[0] = half_to_float((u16)a.x), x[1] = half_to_float((u16)(a.x >> 16));
    x[2] = half_to_float((u16)a.y), x[3] = half_to_float((u16)(a.y >> 16));
}
__device__ __forceinline__ void store4(f16 *to, const float x[4]) {
    *(uint2 *)to = make_uint2(pack_f16(x[0], x[1]), pack_f16(x[2], x[3]));
}
__device__ __forceinline__ void store4(float *to, const float x[4]) {
    *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store4(bf16 *to, const float x[4]) {
    *(uint2 *)to = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// Launches may overlap their predecessor in the stream (Device::launch_overlapping, sm_90 and newer): such a kernel must
// not touch what others wrote, nor write what others read, before wait_for_predecessor(). let_successor_start() only
// allows the next kernel's blocks to be placed; that kernel waits in turn. Plain launches make both do nothing.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns x, or NaN where T cannot hold it.
template <class T> __device__ __forceinline__ float within(float x) { return x; }
template <> __device__ __forceinline__ float within<f16>(float x) {
    return fabsf(x) < 65520.0f ? x : __int_as_float(0x7fffffff);
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

// Reduces over threadIdx.x, a multiple of 32 up to 1024; `scratch` has 32 floats for each threadIdx.y. All get it.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    if (blockDim.x == 32) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0.0f);
}
__device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    if (blockDim.x == 32) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : -INFINITY_F);
}
