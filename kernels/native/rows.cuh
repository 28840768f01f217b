// Embedding rows and the pairwise products of their vectors, as one warp holds them.
//
// A table's rows lie in one arena for all tables: row r of table t starts at element (base[t] + r) * DP, where DP is DIM
// rounded up to 16. ROW_BYTES says what an element is: 4 FP32, 2 FP16, 1 unsigned INT8 with value = q * scale + bias and
// scale_bias[base[t] + r] = (scale, bias) in FP16. An INT8 row of 64 is two 32-byte sectors; scales and biases lie apart
// because theirs stay in the L2 cache (4 bytes a row) while 80-byte rows would cost a third sector of memory each.
//
// A warp holds a sample's vectors x[0 .. F] as operands of mma.m16n8k16: lane = 4 g + t has of vectors g, g + 8, ... the
// elements [t * DP/4, (t + 1) * DP/4), loaded with 16-byte reads. That is a permutation of the columns, the same for all
// vectors, so products do not change, and one set of registers serves as operand A (rows) and B (columns) alike.
//
// BF16 1: vectors on the tensor cores are BF16 instead of FP16.
//
// An id outside its table reads nothing: its row counts as zeros, and errors[0] becomes 1 + the table.
#pragma once
#ifndef __CUDACC_RTC__
#include <cuda_fp16.h>
#include <stdint.h>
#else
#include <cuda_fp16.h>
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#endif

#ifndef F
#define F 26          // tables
#define DIM 64        // width of a vector
#define ROW_BYTES 1   // 4 | 2 | 1 bytes an element of a table
#define DENSE 13      // dense features
#define MULTI 0       // 0: one id for each table; 1: bags of ids, pooled
#define MEAN 0        // 0: bags are summed; 1: averaged
#endif
#ifndef BF16
#define BF16 0
#endif
#if BF16
#include <cuda_bf16.h>
#endif

constexpr int DP = (DIM + 15) / 16 * 16;
constexpr int VECTORS = F + 1;
constexpr int PAIRS = F * (F + 1) / 2;
constexpr int QUARTER = DP / 4;              // elements of a vector that a lane holds
constexpr int HALVES2 = DP / 8;              // the same in FP16 pairs
constexpr int WORDS = QUARTER * ROW_BYTES / 4;
constexpr int KSTEPS = DP / 16;

struct Tables {
    const uint8_t* rows;            // [sum of rows, DP] elements
    const __half2* scale_bias;      // [sum of rows], INT8 only
    const long long* base;          // [F] first row of each table
    const int* count;               // [F] rows of each table
};

struct Ids {
    const int* ids;                 // one-hot [rows, F]; multi-hot [N]
    const int* offsets;             // multi-hot [rows * F + 1]: where each bag starts
    int* errors;                    // [1]
};

struct Raw {                        // what a lane reads of one row
    uint32_t word[WORDS];
    uint32_t scale_bias;
};

// Two numbers in 16 bits each. FP16: what is beyond its range becomes its largest number, 65504, by the same one
// instruction; NaN stays NaN.
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if BF16
    __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&h);
#else
    uint32_t h;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
#endif
}

// Infinite becomes NaN: it is no large number but what somebody made of one, and must show.
__device__ __forceinline__ float finite(float v) { return fmaf(v, 0.f, v); }

__device__ __forceinline__ __half2 as_half2(uint32_t word) { return *reinterpret_cast<__half2*>(&word); }
__device__ __forceinline__ uint32_t as_word(__half2 h) { return *reinterpret_cast<uint32_t*>(&h); }

template <int N>
__device__ __forceinline__ void load_words(uint32_t (&out)[N], const uint8_t* from) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + i);
            out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + i);
    }
}

// The same, or zeros and no access at all unless `live`. Predicated rather than branched around, so that the loads of
// many rows are under way together.
template <int N>
__device__ __forceinline__ void load_words_if(bool live, uint32_t (&out)[N], const uint8_t* from) {
    const int p = live;
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            asm volatile(
                "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
                "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
                "@p ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];\n}"
                : "=&r"(out[i]), "=&r"(out[i + 1]), "=&r"(out[i + 2]), "=&r"(out[i + 3])
                : "l"(from + 4 * i), "r"(p));
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.nc.b32 %0, [%1];\n}"
                         : "=&r"(out[i]) : "l"(from + 4 * i), "r"(p));
    }
}

struct Place {                      // a table, as a lane needs it to find rows
    long long base;
    int count;                      // 0: no table, nothing is read and nothing is wrong
};

__device__ __forceinline__ Place place_of(const Tables& tables, int table) {
    if (table < 0 || table >= F) return {0, 0};
    return {__ldg(tables.base + table), __ldg(tables.count + table)};
}

// Quarter t of row `id` of a table; zeros, and `bad` = 1 + table, when the table has no such row.
__device__ __forceinline__ void fetch(Raw& raw, const Tables& tables, const Place& place, int table, int id, int t,
                                      int& bad) {
    const bool live = static_cast<unsigned>(id) < static_cast<unsigned>(place.count);
    if (!live && place.count > 0) bad = table + 1;
    const long long row = place.base + id;
    load_words_if<WORDS>(live, raw.word, tables.rows + (row * DP + t * QUARTER) * ROW_BYTES);
    raw.scale_bias = 0;
    if constexpr (ROW_BYTES == 1) {
        uint32_t word[1];
        load_words_if<1>(live, word, reinterpret_cast<const uint8_t*>(tables.scale_bias + row));
        raw.scale_bias = word[0];
    }
}

// Columns past DIM are padding: an INT8 row would have its bias there.
__device__ __forceinline__ bool is_column(int t, int i) { return DIM == DP || t * QUARTER + i < DIM; }

__device__ __forceinline__ void decode(const Raw& raw, int t, float (&value)[QUARTER]) {
    if constexpr (ROW_BYTES == 4) {
#pragma unroll
        for (int i = 0; i < QUARTER; ++i) value[i] = __uint_as_float(raw.word[i]);
    } else if constexpr (ROW_BYTES == 2) {
#pragma unroll
        for (int i = 0; i < QUARTER / 2; ++i) {
            float2 pair = __half22float2(as_half2(raw.word[i]));
            value[2 * i] = pair.x, value[2 * i + 1] = pair.y;
        }
    } else {
        const float2 scale_bias = __half22float2(as_half2(raw.scale_bias));
#pragma unroll
        for (int i = 0; i < QUARTER; ++i) {
            const float q = static_cast<float>((raw.word[i / 4] >> (8 * (i % 4))) & 0xff);
            value[i] = is_column(t, i) ? fmaf(q, scale_bias.x, scale_bias.y) : 0.f;
        }
    }
}

// The same as pairs for the tensor cores. INT8 to FP16: 0x6400 | q is the half 1024 + q, so one subtraction and one fused
// multiply-add give q * scale + bias with a single rounding.
__device__ __forceinline__ void decode(const Raw& raw, int t, uint32_t (&half)[HALVES2]) {
    if constexpr (BF16) {
        float value[QUARTER];
        decode(raw, t, value);
#pragma unroll
        for (int i = 0; i < HALVES2; ++i) half[i] = pack(value[2 * i], value[2 * i + 1]);
    } else if constexpr (ROW_BYTES == 1) {
        const __half2 scale = __low2half2(as_half2(raw.scale_bias)), bias = __high2half2(as_half2(raw.scale_bias));
        const __half2 offset = as_half2(0x64006400u);
#pragma unroll
        for (int i = 0; i < HALVES2; ++i) {
            const uint32_t q = __byte_perm(raw.word[i / 2], 0x64646464u, i % 2 ? 0x4342 : 0x4140);
            half[i] = as_word(__hfma2(__hsub2(as_half2(q), offset), scale, bias));
            if (!is_column(t, 2 * i)) half[i] = 0;
            else if (!is_column(t, 2 * i + 1)) half[i] &= 0xffffu;
        }
    } else if constexpr (ROW_BYTES == 2) {
#pragma unroll
        for (int i = 0; i < HALVES2; ++i) half[i] = raw.word[i];
    } else {
#pragma unroll
        for (int i = 0; i < HALVES2; ++i)
            half[i] = pack(__uint_as_float(raw.word[2 * i]), __uint_as_float(raw.word[2 * i + 1]));
    }
}

// Quarter t of the pooled vector of `table` for one sample: value = the sum or mean of its bag's rows, in FP32.
__device__ __forceinline__ void pooled(const Tables& tables, const Ids& in, int sample, int table, int t,
                                       float (&value)[QUARTER], int& bad) {
    Raw raw;
    if constexpr (MULTI == 0) {
        fetch(raw, tables, place_of(tables, table), table, __ldg(in.ids + sample * F + table), t, bad);
        decode(raw, t, value);
    } else {
        const Place place = place_of(tables, table);
#pragma unroll
        for (int i = 0; i < QUARTER; ++i) value[i] = 0.f;
        const int bag = sample * F + table, start = __ldg(in.offsets + bag), end = __ldg(in.offsets + bag + 1);
        for (int at = start; at < end; ++at) {
            float row[QUARTER];
            fetch(raw, tables, place, table, __ldg(in.ids + at), t, bad);
            decode(raw, t, row);
#pragma unroll
            for (int i = 0; i < QUARTER; ++i) value[i] += row[i];
        }
        if (MEAN && end > start) {
            const float share = 1.f / (end - start);
#pragma unroll
            for (int i = 0; i < QUARTER; ++i) value[i] *= share;
        }
    }
}

__device__ __forceinline__ void pooled(const Tables& tables, const Ids& in, int sample, int table, int t,
                                       uint32_t (&half)[HALVES2], int& bad) {
    if constexpr (MULTI == 0) {
        Raw raw;
        fetch(raw, tables, place_of(tables, table), table, __ldg(in.ids + sample * F + table), t, bad);
        decode(raw, t, half);
    } else {
        float value[QUARTER];
        pooled(tables, in, sample, table, t, value, bad);
#pragma unroll
        for (int i = 0; i < HALVES2; ++i) half[i] = pack(value[2 * i], value[2 * i + 1]);
    }
}

#if BF16
#define MMA_OPERANDS "bf16.bf16"
#else
#define MMA_OPERANDS "f16.f16"
#endif

// c += a b: a 16 x 16 row-major, b 16 x 8 column-major, FP16 or BF16 in, FP32 out.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32." MMA_OPERANDS ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The products of vectors 16 i + (0..15) with 16 j + (0..15), j <= i: put(row, column, low, high) gets those of `row`
// with `column`, even, and column + 1.
template <typename Put>
__device__ __forceinline__ void products(int i, int j, const uint32_t (&a)[2][HALVES2], const uint32_t (&b)[2][HALVES2],
                                         int g, int t, Put put) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < KSTEPS; ++k)
            mma(c, a[0][2 * k], a[1][2 * k], a[0][2 * k + 1], a[1][2 * k + 1], b[n][2 * k], b[n][2 * k + 1]);
        put(16 * i + g, 16 * j + 8 * n + 2 * t, c[0], c[1]);
        put(16 * i + g + 8, 16 * j + 8 * n + 2 * t, c[2], c[3]);
    }
}
