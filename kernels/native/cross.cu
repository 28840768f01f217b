// DCNv2 in parts, for any widths and any GPU from sm_80 on: what stands between cuBLASLt's products.
//
//   gather   x0[b, 1 + i] = the (pooled) row of table i                 x0 [rows, F + 1, DP]
//   cross    out[b] = x0[b] * p[b] + x[b], element by element           x0, p, x, out [rows, (F + 1) DP]; out may be x
//
// x0[b, 0] is the bottom MLP's output: its last product writes there. p = W (V x) + bias are two products. Columns of a
// vector from DIM to DP are zero, and stay zero: p is zero there, as its weights and bias are. An infinite p (FP16 alone:
// cuBLASLt's sums overflow) gives NaN. Types, header, pad_dense and head: ends.cuh.
#include "ends.cuh"

constexpr int WIDTH = VECTORS * DP;
constexpr int CHUNK = 16 / MLP_BYTES;   // numbers that a thread of `cross` reads at once

// 16 or 8 bytes at a time: a quarter of a vector is a multiple of 8 bytes.
template <int N>
__device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&word)[N]) {
    static_assert(N % 2 == 0, "words of a quarter");
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            *reinterpret_cast<uint4*>(to + 4 * i) = make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) *reinterpret_cast<uint2*>(to + 4 * i) = make_uint2(word[i], word[i + 1]);
    }
}

// Four threads a bag, a quarter of the vector each.
extern "C" __global__ void __launch_bounds__(256)
gather(const int* header, const int* ids, const int* offsets, const uint8_t* rows, const __half2* scale_bias,
       const long long* base, const int* count, Number* x0, int* errors) {
    const Tables tables{rows, scale_bias, base, count};
    const Ids in{ids, offsets, errors};
    const int bag = (blockIdx.x * 256 + threadIdx.x) / 4, t = threadIdx.x % 4, sample = bag / F, table = bag % F;
    if (sample >= header[0]) return;
    int bad = 0;
    uint32_t word[QUARTER * MLP_BYTES / 4];
#if MLP_BYTES == 2
    pooled(tables, in, sample, table, t, word, bad);
#else
    float value[QUARTER];
    pooled(tables, in, sample, table, t, value, bad);
#pragma unroll
    for (int i = 0; i < QUARTER; ++i) word[i] = __float_as_uint(value[i]);
#endif
    if (bad) *errors = bad;
    Number* to = x0 + (static_cast<size_t>(sample) * VECTORS + 1 + table) * DP + t * QUARTER;
    store_words(reinterpret_cast<uint8_t*>(to), word);
}

extern "C" __global__ void __launch_bounds__(256)
cross(const int* header, const Number* x0, const Number* p, const Number* x, Number* out) {
    const size_t i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i / (WIDTH / CHUNK) >= static_cast<size_t>(header[0])) return;
    const uint4 start = reinterpret_cast<const uint4*>(x0)[i], product = reinterpret_cast<const uint4*>(p)[i];
    uint4 sum = reinterpret_cast<const uint4*>(x)[i];
    const Number* a = reinterpret_cast<const Number*>(&start);
    const Number* b = reinterpret_cast<const Number*>(&product);
    Number* c = reinterpret_cast<Number*>(&sum);
#pragma unroll
    for (int k = 0; k < CHUNK; ++k) c[k] = number(fmaf(value_of(a[k]), finite(value_of(b[k])), value_of(c[k])));
    reinterpret_cast<uint4*>(out)[i] = sum;
}
