// The whole forward pass of a DLRM in one kernel, on Hopper (sm_90a). 64 rows at a time.
//
//   bottom   y = relu(W x + b) for each layer; x_0 = its last output
//   gather   x_1 ... x_F = the (pooled) rows of the tables
//   z        [x_0, x_i . x_j for i > j], order (1,0), (2,0), (2,1) ...
//   top      y = relu(W x + b); logit = w . y + bias; score = 1 / (1 + e^-logit)
//
// FP16 operands, FP32 sums. Inputs: header[0] = rows, dense [capacity, DENSE] FP32, ids as rows.cuh says. Output: scores
// and logits [rows] FP32. Rows past header[0] are computed as zeros and never written. What leaves FP16's range on the way
// is set to its end; NaN stays NaN, and an infinite dense feature becomes NaN.
//
// Who does what. A block holds the activations of its 64 rows in shared memory; eight warps, two warpgroups, share every
// layer's columns. A ninth warp streams the weights from the L2 cache through a ring of bulk copies, always ahead.
//   SPLIT 2 or 4: so many blocks of a cluster score the same 64 rows. Each computes a part of a hidden layer's columns,
//     needs that part of the weights, and sends its columns to the others (copies between shared memories that complete
//     on the receiver's barrier). The first layer (few inputs) and the last of the bottom (few outputs) are computed by
//     every block: cheaper than an exchange. Gather and interaction go by rows. A block begins a layer with the inputs
//     that it made itself, while the others' are under way. Lowest latency for few rows.
//   SPLIT 1: a block has its rows to itself and all weights to read. Activations are overwritten in place, which leaves
//     more memory to the ring. Most rows a second.
//
// Layouts. Activations: column blocks of 64, each [64 rows][128 bytes], 16-byte chunk c of row r at place c ^ (r % 8), as
// wgmma reads with 128-byte swizzle. Weights of a block, in the order of use: stages of up to 16 KB, each tiles
// [up to 128 columns of the layer][64 inputs], swizzled alike; layout.py cuts them. First layer: operands B of
// mma.m16n8k16.
#include "rows.cuh"

#ifndef KD
#define KD 16                    // dense features, padded to 16; at most 64
#define BOTTOM 512, 256          // hidden widths of the bottom MLP; each 256 or 512
#define TOP 512, 512, 256        // hidden widths of the top MLP; each 256 or 512
#define SPLIT 4
#define STAGES 6                 // of the ring: 10 with SPLIT 1, where activations are overwritten in place
#endif

// To find out where time goes: with STAMPS a further argument takes a clock of each warp at 16 places.
#ifdef STAMPS
#define STAMP(i) if (block.lane == 0) stamps[(blockIdx.x * 8 + block.warp) * 16 + i] = clock64()
#else
#define STAMP(i)
#endif

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "hopper.cuh"
#define CONSTANT __host__ __device__ constexpr
constexpr int ROWS = 64, OWN = ROWS / SPLIT, STAGE = 16384, BLOCK64 = ROWS * 128;
constexpr int bottom_width[] = {BOTTOM}, top_width[] = {TOP};
constexpr int BOTTOMS = sizeof(bottom_width) / 4, TOPS = sizeof(top_width) / 4;
// z as it lies here: x_0, then row i of the products from DIM + 2 (i i / 4) on, so that pairs of columns share a word; the
// odd place at the end of a row is zero. layout.py orders the weights alike.
constexpr int ZV = DIM + 2 * (VECTORS * VECTORS / 4), ZB = (ZV + 63) / 64;
constexpr int Z_EXCHANGE = BOTTOMS - 1, EXCHANGES = BOTTOMS + TOPS - 1;
constexpr int FIRST_STAGES = KD / 16, FIRST_BYTES = bottom_width[0] * 32;
constexpr int ACT_BYTES = 8 * BLOCK64, ACTS = SPLIT == 1 ? 1 : 2;
constexpr int RING = ACTS * ACT_BYTES, PARTIAL = RING + STAGES * STAGE, BARRIERS = PARTIAL + 2 * ROWS * 4;

static_assert(SPLIT == 1 || SPLIT == 2 || SPLIT == 4, "blocks that score the same rows");
static_assert(DIM == 16 || DIM == 32 || DIM == 64, "width of a vector");
static_assert(VECTORS <= 32 && ZB <= 8, "an interaction that fits one tile");

// How a layer's columns in a block are cut into stages: columns of a tile, tiles of a stage, stages of a column block.
CONSTANT int part(int width) { return width / SPLIT; }
CONSTANT int tile_columns(int columns) { return columns < 128 ? columns : 128; }
CONSTANT int tiles_of(int columns) { return STAGE / (tile_columns(columns) * 128); }
CONSTANT int wide(int columns) { return columns / tile_columns(columns); }
CONSTANT int stages_of(int columns, int blocks) { return wide(columns) * ((blocks + tiles_of(columns) - 1) / tiles_of(columns)); }
CONSTANT int inputs64(int layer) { return layer == 0 ? ZB : top_width[layer - 1] / 64; }
CONSTANT int bottom_bias(int layer) { return layer == 0 ? 0 : bottom_bias(layer - 1) + bottom_width[layer - 1]; }
CONSTANT int top_bias(int layer) {
    return layer == 0 ? bottom_bias(BOTTOMS) + DIM : top_bias(layer - 1) + top_width[layer - 1];
}

#include "block.cuh"

// ---- bottom MLP ------------------------------------------------------------------------------------------------------

struct FirstInputs {
    float x[FIRST_STAGES][4][2];
    __device__ void load(const Block& block, const float* dense, int row0, int capacity) {
#pragma unroll
        for (int k = 0; k < FIRST_STAGES; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = row0 + block.warp % 4 * 16 + block.g + i % 2 * 8;
                    const int column = 16 * k + i / 2 * 8 + 2 * block.t + h;
                    x[k][i][h] = row < capacity && column < DENSE ? __ldg(dense + static_cast<size_t>(row) * DENSE + column) : 0.f;
                }
    }
    // Operand A, with rows from `rows` on as zeros.
    __device__ uint32_t operand(const Block& block, int k, int i, int row0, int rows) const {
        const bool live = row0 + block.warp % 4 * 16 + block.g + i % 2 * 8 < rows;
        return live ? pack(finite(x[k][i][0]), finite(x[k][i][1])) : 0;
    }
};

// First layer: all columns, of which a warp has half for 16 rows; its stages of the ring hold operands B.
constexpr int FIRST_TILES = bottom_width[0] / 16;
__device__ __forceinline__ void first_layer(const Block& block, const uint32_t (&a)[FIRST_STAGES][4],
                                            const float2 (&bias)[FIRST_TILES]) {
    constexpr int half = FIRST_TILES, together = 8;
    const int first = block.group() * half;
    const uint32_t row = block.act(0) + (block.warp % 4 * 16 + block.g) * 128 + 4 * block.t;
#pragma unroll
    for (int k = 0; k < FIRST_STAGES; ++k) barrier_wait(block.full(k), 0);
#pragma unroll
    for (int i = 0; i < half; i += together) {
        float c[together][4];
#pragma unroll
        for (int n = 0; n < together; ++n) {
            c[n][0] = c[n][2] = bias[i + n].x, c[n][1] = c[n][3] = bias[i + n].y;
#pragma unroll
            for (int k = 0; k < FIRST_STAGES; ++k) {
                uint2 b;
                asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(b.x), "=r"(b.y)
                             : "r"(block.smem + RING + k * STAGE + ((first + i + n) * 32 + block.lane) * 8));
                mma(c[n], a[k][0], a[k][1], a[k][2], a[k][3], b.x, b.y);
            }
        }
#pragma unroll
        for (int n = 0; n < together; ++n) {
            const int tile = first + i + n;
            const uint32_t at = row + tile / 8 * BLOCK64 + ((n ^ block.g) << 4);
            store_shared(at, relu(c[n][0], c[n][1]));
            store_shared(at + 8 * 128, relu(c[n][2], c[n][3]));
        }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < FIRST_STAGES; ++k) release(block, k, 1);
}

// The hidden layers from the second on, then the output for this block's own rows: x_0, the start of z.
template <int LAYER>
__device__ __forceinline__ void bottom_layers(const Block& block, const float* bias, int& stage) {
    constexpr int blocks = bottom_width[LAYER - 1] / 64, e = LAYER - 1;     // exchange e carries this layer's output
    if constexpr (LAYER < BOTTOMS) {
        constexpr int columns = part(bottom_width[LAYER]);
        hidden_layer<columns, blocks, 4 * blocks, e - 1>(block, bias + bottom_bias(LAYER), block.act(e), block.act(e + 1), stage);
        exchange(block, e, block.act(e + 1), columns);
        bottom_layers<LAYER + 1>(block, bias, stage);
    } else {
        float acc[DIM / 4];
        uint32_t out[DIM / 8];
        start(block, acc, bias + bottom_bias(BOTTOMS), block.group() * (DIM / 2));
        multiply<DIM, blocks, 4 * blocks, e - 1>(block, acc, block.act(e), stage);
        activate(out, acc);
        before_store();
        if (block.warp % 4 * 16 / OWN == block.part()) store(block, out, block.act(e + 1), block.group() * (DIM / 2));
    }
}

#include "gather.cuh"

// ---- top MLP ---------------------------------------------------------------------------------------------------------

template <int LAYER>
__device__ __forceinline__ void top_layers(const Block& block, const float* bias, const float* head, int& stage,
                                           long long* stamps) {
    constexpr int columns = part(top_width[LAYER]), blocks = inputs64(LAYER), in = Z_EXCHANGE + LAYER;
    constexpr int used = LAYER == 0 ? (ZV + 15) / 16 : 4 * blocks, e = LAYER == 0 ? -1 : in;
    const uint32_t from = block.act(in + 1), to = block.act(in + 2);
    STAMP(7 + 2 * LAYER);
    if constexpr (LAYER + 1 < TOPS) {
        hidden_layer<columns, blocks, used, e>(block, bias + top_bias(LAYER), from, to, stage);
        STAMP(8 + 2 * LAYER);
        exchange(block, in + 1, to, columns);
        top_layers<LAYER + 1>(block, bias, head, stage, stamps);
    } else {
        constexpr int parts = parts_of(columns), half = columns / parts / 2;
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int p = 0; p < parts; ++p) {
            const int column = block.part() * columns + block.group() * half + p * PART_STEP;
            float acc[half / 2];
            float2 w[half / 8];
#pragma unroll
            for (int j = 0; j < half / 8; ++j) w[j] = __ldg(reinterpret_cast<const float2*>(head + column + 8 * j + 2 * block.t));
            start(block, acc, bias + top_bias(LAYER), column);
            multiply<columns / parts, blocks, used, e>(block, acc, from, stage);
#pragma unroll
            for (int j = 0; j < half / 8; ++j) {
                low = fmaf(relu(acc[4 * j]), w[j].x, fmaf(relu(acc[4 * j + 1]), w[j].y, low));
                high = fmaf(relu(acc[4 * j + 2]), w[j].x, fmaf(relu(acc[4 * j + 3]), w[j].y, high));
            }
        }
        STAMP(8 + 2 * LAYER);
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
            low += __shfl_xor_sync(0xffffffffu, low, step);
            high += __shfl_xor_sync(0xffffffffu, high, step);
        }
        if (block.t == 0) {
            // Each block finishes its own rows: those of warps 4 / SPLIT * part ...
            const int row = block.warp % 4 * 16 + block.g, owner = SPLIT == 1 ? block.rank : row / OWN;
            const uint32_t local = block.smem + PARTIAL + ((block.part() * 2 + block.group()) * OWN + row % OWN) * 4;
            const uint32_t at = at_rank(local, owner);
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(low) : "memory");
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at + 32), "f"(high) : "memory");
        }
    }
}

// Thread i: the score of own row i, from the sums of all parts of the last hidden layer.
__device__ __forceinline__ void finish(const Block& block, const float* partial, const float* head, int row, int rows,
                                       float* scores, float* logits) {
    if (threadIdx.x < OWN && row < rows) {
        float logit = __ldg(head + top_width[TOPS - 1]);
#pragma unroll
        for (int i = 0; i < 2 * SPLIT; ++i) logit += partial[i * OWN + threadIdx.x];
        logits[row] = logit;
        scores[row] = 1.f / (1.f + expf(-logit));
    }
}
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define IN_CLUSTERS __cluster_dims__(SPLIT, 1, 1)
#else
#define IN_CLUSTERS
#endif
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(384, 1)
fused(const int* header, const float* dense, const int* ids, const int* offsets, const uint8_t* rows,
      const __half2* scale_bias, const long long* base, const int* count, const uint8_t* first, const uint8_t* weights,
      int weights_bytes, int capacity, const float* bias, const float* head, float* scores, float* logits, int* errors
#ifdef STAMPS
      , long long* stamps
#endif
) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t memory[];
#ifndef STAMPS
    long long* stamps = nullptr;
#endif
    Block block;
    block.smem = address(memory);
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block.rank));
    block.warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);    // the same for a whole warp: no divergence
    block.lane = threadIdx.x % 32, block.g = block.lane / 4, block.t = block.lane % 4;
    const int row0 = blockIdx.x / SPLIT * ROWS;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(block.full(i), 1), barrier_init(block.empty(i), 8);
        for (int e = 0; e < EXCHANGES * (SPLIT - 1); ++e) barrier_init(block.arrived(0, 1 + e), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_arrive();

    if (block.warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) {
            Producer producer{block, weights + static_cast<size_t>(block.part()) * weights_bytes};
            producer.first(first);
            if (row0 < __ldg(header)) producer.run();
            else producer.nothing();
        }
        __syncwarp();
        cluster_wait();
        cluster_arrive();
        cluster_wait();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        STAMP(0);
        const Tables tables{rows, scale_bias, base, count};
        const Ids in{ids, offsets, errors};
        Gather gather(block, tables, in, row0, capacity);
        FirstInputs inputs;
        int id[TOGETHER][4];
        Raw raw[TOGETHER][4];
        float2 first_bias[FIRST_TILES];
        inputs.load(block, dense, row0, capacity);
#pragma unroll
        for (int i = 0; i < FIRST_TILES; ++i)
            first_bias[i] = __ldg(reinterpret_cast<const float2*>(bias + (block.group() * FIRST_TILES + i) * 8 + 2 * block.t));
        if constexpr (MULTI == 0) gather.load_ids(id, 0);
        const int n = __ldg(header);
        if (row0 >= n) {    // all blocks of the cluster
            cluster_wait();
            cluster_arrive();
            cluster_wait();
            return;
        }
        uint32_t a[FIRST_STAGES][4];
#pragma unroll
        for (int k = 0; k < FIRST_STAGES; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[k][i] = inputs.operand(block, k, i, row0, n);
        STAMP(1);
        if constexpr (MULTI == 0) gather.load_rows(raw, id, 0, n);
        first_layer(block, a, first_bias);
        fence_async();
        cluster_wait();     // the others' barriers stand: from here on blocks write to each other
        sync_warps();
        STAMP(2);
        int stage = FIRST_STAGES;
        bottom_layers<1>(block, bias, stage);
        sync_warps();
        STAMP(4);
        gather.run(raw, block.act(Z_EXCHANGE + 1), n);
        STAMP(5);
        gather.share(block.act(Z_EXCHANGE + 1));
        STAMP(6);
        for (int from = 1; from < SPLIT; ++from) barrier_wait(block.arrived(Z_EXCHANGE, from), 0);
        top_layers<0>(block, bias, head, stage, stamps);
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        finish(block, reinterpret_cast<const float*>(memory + PARTIAL), head, row0 + block.part() * OWN + threadIdx.x, n,
               scores, logits);
        STAMP(15);
    }
#endif
}
