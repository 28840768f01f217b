// What comes before the first product and after the last one, and the type of the numbers in between.
//
//   pad_dense   a[b, k] = dense[b, k] for k < DENSE, 0 up to KD          dense [rows, DENSE] FP32, a [rows, KD]
//   head        logit[b] = h[b] . w + bias, score = 1 / (1 + e^-logit)   h [rows, HEAD], w [HEAD + 1] FP32
//               NaN when another number of the row, in one of CHECKED buffers, is infinite or NaN: FP16 alone
//
// Our kernels turn FP32 into FP16 with saturation; cuBLASLt does not: a sum beyond 65504 becomes infinite, and what comes
// of that later (0 after a ReLU, say) may look like any other score. So head looks at all that products read and wrote.
//
// Numbers between kernels are FP16 (MLP_BYTES 2), BF16 (MLP_BYTES 2, BF16 1) or FP32 (MLP_BYTES 4); sums are FP32.
// header[0] is the number of rows; rows past it are neither read nor written. Part of layers.cu and cross.cu.
#pragma once
#include "rows.cuh"

#ifndef KD
#define KD 16      // dense features, padded
#define HEAD 256   // width of the last hidden layer
#define MLP_BYTES 2
#define CHECKED 0
#endif

#if MLP_BYTES == 4
typedef float Number;
__device__ __forceinline__ Number number(float v) { return v; }
__device__ __forceinline__ float value_of(Number v) { return v; }
#elif BF16
typedef __nv_bfloat16 Number;
__device__ __forceinline__ Number number(float v) { return __float2bfloat16_rn(v); }
__device__ __forceinline__ float value_of(Number v) { return __bfloat162float(v); }
#else
typedef __half Number;
__device__ __forceinline__ Number number(float v) { return __ushort_as_half(static_cast<unsigned short>(pack(v, 0.f))); }
__device__ __forceinline__ float value_of(Number v) { return __half2float(v); }
#endif

extern "C" __global__ void pad_dense(const int* header, const float* dense, Number* a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / KD, column = i % KD;
    if (row < header[0]) a[i] = number(column < DENSE ? finite(dense[row * DENSE + column]) : 0.f);
}

struct Buffer {                     // [rows, width] FP16; width a multiple of 8
    const uint8_t* start;
    long long width;
};

// Whether a number of the row in one of the buffers is infinite or NaN: its exponent is all ones. One warp.
__device__ __forceinline__ bool broken(const Buffer* buffers, int row, int lane) {
    uint32_t found = 0;
#pragma unroll 1
    for (int i = 0; i < CHECKED; ++i) {
        const long long width = buffers[i].width;
        const uint4* words = reinterpret_cast<const uint4*>(buffers[i].start + row * width * 2);
        for (int at = lane; at < width / 8; at += 32) {
            const uint4 v = words[at];
            found |= (v.x & 0x7c007c00u) + 0x04000400u, found |= (v.y & 0x7c007c00u) + 0x04000400u;
            found |= (v.z & 0x7c007c00u) + 0x04000400u, found |= (v.w & 0x7c007c00u) + 0x04000400u;
        }
    }
    return __any_sync(0xffffffffu, found & 0x80008000u);
}

// One warp a row.
extern "C" __global__ void __launch_bounds__(128)
head(const int* header, const Buffer* checked, const Number* h, const float* w, float* scores, float* logits) {
    const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= header[0]) return;
    float sum = 0.f;
    for (int k = lane; k < HEAD; k += 32) sum = fmaf(value_of(h[static_cast<size_t>(row) * HEAD + k]), w[k], sum);
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    const bool lost = CHECKED && broken(checked, row, lane);
    if (lane == 0) {
        const float logit = lost ? __int_as_float(0x7fffffff) : sum + w[HEAD];
        logits[row] = logit;
        scores[row] = 1.f / (1.f + expf(-logit));
    }
}
