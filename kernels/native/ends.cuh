// What comes before the first product and after the last one, and the type of the numbers in between.
//
//   pad_dense   a[b, k] = dense[b, k] for k < DENSE, 0 up to KD          dense [rows, DENSE] FP32, a [rows, KD]
//   head        logit[b] = h[b] . w + bias, score = 1 / (1 + e^-logit)   h [rows, HEAD], w [HEAD + 1] FP32
//
// Numbers between kernels are FP16 (MLP_BYTES 2), BF16 (MLP_BYTES 2, BF16 1) or FP32 (MLP_BYTES 4); sums are FP32.
// header[0] is the number of rows; rows past it are neither read nor written. Part of layers.cu and cross.cu.
#pragma once
#include "rows.cuh"

#ifndef KD
#define KD 16      // dense features, padded
#define HEAD 256   // width of the last hidden layer
#define MLP_BYTES 2
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
__device__ __forceinline__ Number number(float v) { return __float2half_rn(v); }
__device__ __forceinline__ float value_of(Number v) { return __half2float(v); }
#endif

extern "C" __global__ void pad_dense(const int* header, const float* dense, Number* a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / KD, column = i % KD;
    if (row < header[0]) a[i] = number(column < DENSE ? dense[row * DENSE + column] : 0.f);
}

// One warp a row.
extern "C" __global__ void __launch_bounds__(128)
head(const int* header, const Number* h, const float* w, float* scores, float* logits) {
    const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= header[0]) return;
    float sum = 0.f;
    for (int k = lane; k < HEAD; k += 32) sum = fmaf(value_of(h[static_cast<size_t>(row) * HEAD + k]), w[k], sum);
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) {
        const float logit = sum + w[HEAD];
        logits[row] = logit;
        scores[row] = 1.f / (1.f + expf(-logit));
    }
}
