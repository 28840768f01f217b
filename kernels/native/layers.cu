// DLRM with dot interaction in parts, for any widths and any GPU from sm_80 on: what stands between cuBLASLt's products.
//
//   interact_half   z[b] = [x0[b], x_i . x_j for i > j]      x0 [rows, DP], z [rows, ZP], FP16 or BF16 in, FP32 sums
//   interact_float  the same in FP32                         x0 [rows, DP], z [rows, ZP]
//
// x_1 ... x_F are the (pooled) rows of the tables, gathered here: they never pass through memory. Order of the products:
// (1,0), (2,0), (2,1), (3,0) ... DP, ZP are widths rounded up for aligned reads; columns past ZV = DIM + PAIRS of z are
// zero from the start and never written. Types, header, pad_dense and head: ends.cuh.
#include "ends.cuh"

#ifndef ZP
#define ZP 416     // width of z, padded
#endif

#if MLP_BYTES == 2
constexpr int TILES = (VECTORS + 15) / 16;
constexpr bool HOLD = TILES * 2 * HALVES2 <= 64;   // all vectors of a sample fit the registers

__device__ __forceinline__ void load_tile(uint32_t (&x)[2][HALVES2], int tile, const Tables& tables, const Ids& in,
                                          const Number* x0, int sample, int g, int t, int& bad) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int vector = 16 * tile + 8 * h + g;
        if (vector == 0) {
            load_words<HALVES2>(x[h], reinterpret_cast<const uint8_t*>(x0 + static_cast<size_t>(sample) * DP + t * QUARTER));
        } else if (vector < VECTORS) {
            pooled(tables, in, sample, vector - 1, t, x[h], bad);
        } else {
#pragma unroll
            for (int i = 0; i < HALVES2; ++i) x[h][i] = 0;
        }
    }
}

// One warp a sample, four samples a block; z is put together in shared memory and leaves in 16-byte writes.
extern "C" __global__ void __launch_bounds__(128)
interact_half(const int* header, const int* ids, const int* offsets, const uint8_t* rows, const __half2* scale_bias,
              const long long* base, const int* count, const Number* x0, Number* z, int* errors) {
    extern __shared__ __align__(16) Number staged[];
    const Tables tables{rows, scale_bias, base, count};
    const Ids in{ids, offsets, errors};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int sample = blockIdx.x * 4 + warp;
    if (sample >= header[0]) return;
    Number* out = staged + warp * ZP;
    for (int i = lane; i < DIM; i += 32) out[i] = x0[static_cast<size_t>(sample) * DP + i];
    for (int i = DIM + PAIRS + lane; i < ZP; i += 32) out[i] = number(0.f);
    int bad = 0;
    auto put = [&](int row, int column, float low, float high) {
        Number* at = out + DIM + row * (row - 1) / 2 + column;
        if (row < VECTORS && column < row) at[0] = number(low);
        if (row < VECTORS && column + 1 < row) at[1] = number(high);
    };
    if constexpr (HOLD) {
        uint32_t x[TILES][2][HALVES2];
#pragma unroll
        for (int i = 0; i < TILES; ++i) load_tile(x[i], i, tables, in, x0, sample, g, t, bad);
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int j = 0; j <= i; ++j) products(i, j, x[i], x[j], g, t, put);
    } else {
        for (int i = 0; i < TILES; ++i) {
            uint32_t a[2][HALVES2], b[2][HALVES2];
            load_tile(a, i, tables, in, x0, sample, g, t, bad);
            products(i, i, a, a, g, t, put);
            for (int j = 0; j < i; ++j) {
                load_tile(b, j, tables, in, x0, sample, g, t, bad);
                products(i, j, a, b, g, t, put);
            }
        }
    }
    if (bad) *errors = bad;
    __syncwarp();
    uint4* to = reinterpret_cast<uint4*>(z + static_cast<size_t>(sample) * ZP);
    for (int i = lane; i < ZP / 8; i += 32) to[i] = reinterpret_cast<uint4*>(out)[i];
}
#else
// One warp a sample and a block. Vectors lie in shared memory, DIM + 1 apart, so that lanes with different pairs read
// different banks.
extern "C" __global__ void __launch_bounds__(32)
interact_float(const int* header, const int* ids, const int* offsets, const uint8_t* rows, const __half2* scale_bias,
               const long long* base, const int* count, const float* x0, float* z, int* errors) {
    extern __shared__ float x[];
    const Tables tables{rows, scale_bias, base, count};
    const Ids in{ids, offsets, errors};
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4, sample = blockIdx.x;
    if (sample >= header[0]) return;
    float* out = z + static_cast<size_t>(sample) * ZP;
    int bad = 0;
    for (int i = lane; i < DIM; i += 32) out[i] = x[i] = x0[static_cast<size_t>(sample) * DP + i];
    for (int table = g; table < F; table += 8) {
        float value[QUARTER];
        pooled(tables, in, sample, table, t, value, bad);
#pragma unroll
        for (int i = 0; i < QUARTER; ++i)
            if (is_column(t, i)) x[(table + 1) * (DIM + 1) + t * QUARTER + i] = value[i];
    }
    if (bad) *errors = bad;
    __syncwarp();
    int row = 1, column = lane;
    for (int pair = lane; pair < PAIRS; pair += 32, column += 32) {
        while (column >= row) column -= row++;
        float sum = 0.f;
        for (int k = 0; k < DIM; ++k) sum = fmaf(x[row * (DIM + 1) + k], x[column * (DIM + 1) + k], sum);
        out[DIM + pair] = sum;
    }
}
#endif
