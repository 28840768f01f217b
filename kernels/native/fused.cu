// The whole forward pass of a DLRM in one kernel, on Hopper (sm_90a). 64 rows at a time.
//
//   bottom   y = relu(W x + b) for each layer; x_0 = its last output
//   gather   x_1 ... x_F = the (pooled) rows of the tables
//   z        [x_0, x_i . x_j for i > j], order (1,0), (2,0), (2,1) ...
//   top      y = relu(W x + b); logit = w . y + bias; score = 1 / (1 + e^-logit)
//
// FP16 operands, FP32 sums. Inputs: header[0] = rows, dense [capacity, DENSE] FP32, ids as rows.cuh says. Output: scores
// and logits [rows] FP32. Rows past header[0] are computed as zeros and never written.
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

// ---- one block -------------------------------------------------------------------------------------------------------

struct Block {
    uint32_t smem;          // shared memory, from its start
    int rank, warp, lane, g, t;
    __device__ uint32_t act(int buffer) const { return smem + buffer % ACTS * ACT_BYTES; }
    __device__ uint32_t full(int stage) const { return smem + BARRIERS + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return smem + BARRIERS + 8 * (STAGES + stage); }
    // Exchange e: what the block `from` places further (1 ... SPLIT - 1) sends has come.
    __device__ uint32_t arrived(int e, int from) const {
        return smem + BARRIERS + 8 * (2 * STAGES + e * (SPLIT - 1) + from - 1);
    }
    __device__ int group() const { return warp / 4; }
    __device__ int part() const { return SPLIT == 1 ? 0 : rank; }      // of a split layer
};

// Where columns (column, column + 1) of a row lie in a swizzled buffer.
__device__ __forceinline__ uint32_t place(int row, int column) {
    return column / 64 * BLOCK64 + row * 128 + ((column % 64 * 2) ^ (row % 8 * 16));
}

// max(0, x) that keeps a NaN: a broken row must show, not score like another.
__device__ __forceinline__ uint32_t relu(uint32_t pair) { return as_word(__hmax2_nan(as_half2(pair), as_half2(0))); }
__device__ __forceinline__ float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}

// The ninth warp: all weights of this block, stage by stage. A stage is free when all that read it have said so.
struct Producer {
    const Block& block;
    const uint8_t* from;
    int stages = 0;
    template <int COLUMNS, int BLOCKS>
    __device__ void layer() {
        if constexpr (COLUMNS > 256) {
            layer<256, BLOCKS>();
            layer<256, BLOCKS>();
            return;
        }
        constexpr int tiles = tiles_of(COLUMNS);
        for (int first = 0; first < BLOCKS; first += tiles)
            for (int w = 0; w < wide(COLUMNS); ++w, ++stages) {
                const int stage = stages % STAGES, bytes = min(tiles, BLOCKS - first) * tile_columns(COLUMNS) * 128;
                if (stages >= STAGES) barrier_wait(block.empty(stage), (stages / STAGES - 1) & 1);
                barrier_expect(block.full(stage), bytes);
                copy_weights(block.smem + RING + stage * STAGE, from, bytes, block.full(stage));
                from += bytes;
            }
    }
    template <int LAYER>
    __device__ void bottom() {
        if constexpr (LAYER < BOTTOMS) {
            layer<part(bottom_width[LAYER]), bottom_width[LAYER - 1] / 64>();
            bottom<LAYER + 1>();
        }
    }
    template <int LAYER>
    __device__ void top() {
        if constexpr (LAYER < TOPS) {
            layer<part(top_width[LAYER]), inputs64(LAYER)>();
            top<LAYER + 1>();
        }
    }
    // The first layer's weights, one stage for 16 inputs: wanted before it is known whether there are rows at all.
    __device__ void first(const uint8_t* w) {
        for (; stages < FIRST_STAGES; ++stages) {
            barrier_expect(block.full(stages), FIRST_BYTES);
            copy_weights(block.smem + RING + stages * STAGE, w + stages * FIRST_BYTES, FIRST_BYTES, block.full(stages));
        }
    }
    __device__ void nothing() const {
        for (int i = 0; i < FIRST_STAGES; ++i) barrier_wait(block.full(i), 0);
    }
    __device__ void run() {
        bottom<1>();
        layer<DIM, bottom_width[BOTTOMS - 1] / 64>();
        top<0>();
    }
};

// Where in the ring stage s + skip is, and which round of the ring that is, odd or even. s is known when this is compiled,
// skip (0 or 1) is not: no division must be left.
__device__ __forceinline__ int slot_of(int s, int skip) {
    return s % STAGES == STAGES - 1 ? (skip ? 0 : STAGES - 1) : s % STAGES + skip;
}
__device__ __forceinline__ int phase_of(int s, int skip) {
    return (s / STAGES + (s % STAGES == STAGES - 1 ? skip : 0)) & 1;
}

// This warp has read a stage. `count` makes eight arrivals, whether one warpgroup reads it or both.
__device__ __forceinline__ void release(const Block& block, int slot, int count) {
    if (block.lane == 0) barrier_arrive(block.empty(slot), count);
}

// acc += activations [64, 64 BLOCKS] x the tiles of COLUMNS <= 256 columns, of which each warpgroup has half. `stage` is
// the first of the layer and becomes the first of the next. With E >= 0 the inputs come by exchange E, and the order of
// column blocks begins with this block's own.
template <int COLUMNS, int BLOCKS, int USED, int E, int N>
__device__ __forceinline__ void multiply(const Block& block, float (&acc)[N], uint32_t act, int& stage) {
    constexpr int tiles = tiles_of(COLUMNS), across = wide(COLUMNS);
    constexpr int rounds = (BLOCKS + tiles - 1) / tiles, count = across == 1 ? 1 : 2;
    constexpr int each = BLOCKS / SPLIT;    // column blocks that one sender made
    constexpr bool exchanged = E >= 0 && SPLIT > 1;
    static_assert(COLUMNS == 4 * N && across <= 2, "half of the columns for each warpgroup");
    const int skip = across == 1 ? 0 : block.group(), column = across == 1 ? block.group() * (COLUMNS / 2) : 0;
    const int own = exchanged ? block.rank * each : 0;
    pin(acc);
#pragma unroll
    for (int c = 0; c < rounds; ++c) {
        const int slot = slot_of(stage + c * across, skip);
        barrier_wait(block.full(slot), phase_of(stage + c * across, skip));
        if constexpr (exchanged)
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile)
                if (c * tiles + tile > 0 && (c * tiles + tile) % each == 0 && c * tiles + tile < BLOCKS)
                    barrier_wait(block.arrived(E, (c * tiles + tile) / each), 0);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
            const int from = exchanged ? (own + c * tiles + tile) % BLOCKS : c * tiles + tile;
            const uint64_t a = matrix(act + from * BLOCK64);
            const uint64_t b = matrix(block.smem + RING + slot * STAGE + (tile * tile_columns(COLUMNS) + column) * 128);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if ((c * tiles + tile) * 4 + k < USED) wgmma(acc, a + 2 * k, b + 2 * k);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (c > 0) {
            wgmma_wait<1>();
            release(block, slot_of(stage + (c - 1) * across, skip), count);
        }
    }
    wgmma_wait<0>();
    pin(acc);
    release(block, slot_of(stage + (rounds - 1) * across, skip), count);
    stage += rounds * across;
}

// Columns from one part of a warpgroup's half of a layer to the next: 512 columns are computed as two times 256.
constexpr int PART_STEP = 256;
CONSTANT int parts_of(int columns) { return columns > PART_STEP ? columns / PART_STEP : 1; }

// The accumulators of columns `column` ... start as their biases, read while the block still waits for its input.
template <int N>
__device__ __forceinline__ void start(const Block& block, float (&acc)[N], const float* bias, int column) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        const float2 b = __ldg(reinterpret_cast<const float2*>(bias + column + 8 * j + 2 * block.t));
        acc[4 * j] = acc[4 * j + 2] = b.x;
        acc[4 * j + 1] = acc[4 * j + 3] = b.y;
    }
}

// relu(acc) as FP16 pairs.
template <int N>
__device__ __forceinline__ void activate(uint32_t (&out)[N / 2], const float (&acc)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out[i] = relu(pack(acc[2 * i], acc[2 * i + 1]));
}

// These into the activations, columns from `column` on: a multiple of 64, or all within one block of 64.
template <int N>
__device__ __forceinline__ void store(const Block& block, const uint32_t (&out)[N], uint32_t act, int column) {
    uint32_t row = act + column / 64 * BLOCK64 + (block.warp % 4 * 16 + block.g) * 128 + block.t * 4;
    asm volatile("" : "+r"(row));   // as above: not the same for all layers
    const int chunk = column % 64 / 8;
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
        const uint32_t at = row + j / 8 * BLOCK64 + (((chunk + j % 8) ^ block.g) << 4);
        store_shared(at, out[2 * j]);
        store_shared(at + 8 * 128, out[2 * j + 1]);
    }
}

// Before a layer's output overwrites its input: both warpgroups have read it. With two buffers nothing is overwritten.
__device__ __forceinline__ void before_store() {
    if constexpr (ACTS == 1) sync_warps();
}

// One thread: `bytes` at `at` go to the same place in the blocks that score the same rows, first to the one that needs
// them first.
__device__ __forceinline__ void send(const Block& block, int e, uint32_t at, int bytes) {
    if constexpr (SPLIT > 1) {
#pragma unroll
        for (int i = 1; i < SPLIT; ++i) barrier_expect(block.arrived(e, i), bytes);
#pragma unroll
        for (int i = 1; i < SPLIT; ++i) {
            const int peer = (block.rank + SPLIT - i) % SPLIT;
            copy_to_peer(at_rank(at, peer), at, bytes, at_rank(block.arrived(e, i), peer));
        }
    }
}

// The block's `columns` of a layer stand in `act`: share them.
__device__ __forceinline__ void exchange(const Block& block, int e, uint32_t act, int columns) {
    fence_async();
    sync_warps();
    const int bytes = columns / 64 * BLOCK64;
    if (threadIdx.x == 0) send(block, e, act + block.rank * bytes, bytes);
}

// This block's columns of a hidden layer: from the activations in `from` to those in `to`.
template <int COLUMNS, int BLOCKS, int USED, int E>
__device__ __forceinline__ void hidden_layer(const Block& block, const float* bias, uint32_t from, uint32_t to, int& stage) {
    constexpr int parts = parts_of(COLUMNS), columns = COLUMNS / parts;
    const int column = block.part() * COLUMNS + block.group() * (columns / 2);
    uint32_t out[parts][columns / 8];
#pragma unroll
    for (int p = 0; p < parts; ++p) {
        float acc[columns / 4];
        start(block, acc, bias, column + p * PART_STEP);
        multiply<columns, BLOCKS, USED, E>(block, acc, from, stage);
        activate(out[p], acc);
    }
    before_store();
#pragma unroll
    for (int p = 0; p < parts; ++p) store(block, out[p], to, column + p * PART_STEP);
}

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
        return live ? pack(x[k][i][0], x[k][i][1]) : 0;
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
            store_shared(at, relu(pack(c[n][0], c[n][1])));
            store_shared(at + 8 * 128, relu(pack(c[n][2], c[n][3])));
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

// ---- gather and interaction ------------------------------------------------------------------------------------------

constexpr int SAMPLES = OWN / 8;    // of a warp
constexpr int MOST = MULTI ? 1 : WORDS <= 4 ? 2 : 1;
constexpr int TOGETHER = SAMPLES < MOST ? SAMPLES : MOST;   // samples whose rows are read at once

struct Gather {
    const Block& block;
    const Tables& tables;
    const Ids& in;
    int row0, capacity;     // of the 64 rows; of the memory behind ids
    Place places[4];        // tables of the lane's vectors g + 8 j
    int bad = 0;

    __device__ Gather(const Block& block, const Tables& tables, const Ids& in, int row0, int capacity)
        : block(block), tables(tables), in(in), row0(row0), capacity(capacity) {
#pragma unroll
        for (int j = 0; j < 4; ++j) places[j] = place_of(tables, table(j));
    }

    __device__ int table(int j) const { return 8 * j + block.g - 1; }
    __device__ int local(int i) const { return block.part() * OWN + block.warp * SAMPLES + i; }

    __device__ void load_ids(int (&id)[TOGETHER][4], int first) const {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = row0 + local(first + i);
                const bool there = table(j) >= 0 && table(j) < F && row < capacity;
                id[i][j] = there ? __ldg(in.ids + row * F + table(j)) : 0;
            }
    }

    __device__ void load_rows(Raw (&raw)[TOGETHER][4], const int (&id)[TOGETHER][4], int first, int rows) {
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const Place place{places[j].base, row0 + local(first + i) < rows ? places[j].count : 0};
                fetch(raw[i][j], tables, place, table(j), id[i][j], block.t, bad);
            }
    }

    // z of one own row into the activations; x holds the lane's quarters of vectors g + 8 j, but for x_0.
    __device__ void interact(uint32_t (&x)[2][2][HALVES2], int i, uint32_t z) const {
        const int row = local(i);
        if (block.g == 0) {
#pragma unroll
            for (int w = 0; w < HALVES2; ++w)
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x[0][0][w]) : "r"(z + place(row, block.t * QUARTER + 2 * w)));
        }
        auto put = [&](int vector, int column, float low, float high) {
            if (vector < VECTORS && column < vector)
                store_shared(z + place(row, DIM + 2 * (vector * vector / 4) + column), pack(low, column + 1 < vector ? high : 0.f));
        };
        products(0, 0, x[0], x[0], block.g, block.t, put);
        if constexpr (VECTORS > 16) {
            products(1, 0, x[1], x[0], block.g, block.t, put);
            products(1, 1, x[1], x[1], block.g, block.t, put);
        }
        for (int column = ZV + 2 * block.lane; column < 64 * ZB; column += 64) store_shared(z + place(row, column), 0);
    }

    __device__ void run(Raw (&raw)[TOGETHER][4], uint32_t z, int rows) {
#pragma unroll 1
        for (int first = 0; first < SAMPLES; first += TOGETHER) {
            int id[TOGETHER][4];
            const bool more = MULTI == 0 && first + TOGETHER < SAMPLES;
            if (more) load_ids(id, first + TOGETHER);
            uint32_t x[TOGETHER][2][2][HALVES2];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int row = row0 + local(first + i);
                    uint32_t(&to)[HALVES2] = x[i][j / 2][j % 2];
                    if constexpr (MULTI == 0) {
                        decode(raw[i][j], block.t, to);
                    } else if (places[j].count > 0 && row < rows) {
                        pooled(tables, in, row, table(j), block.t, to, bad);
                    } else {
#pragma unroll
                        for (int w = 0; w < HALVES2; ++w) to[w] = 0;
                    }
                }
            if (more) load_rows(raw, id, first + TOGETHER, rows);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) interact(x[i], first + i, z);
        }
        if (bad) *in.errors = bad;
    }

    // Own rows of each column block go to the blocks that score the same rows, one copy a lane.
    __device__ void share(uint32_t z) const {
        fence_async();
        sync_warps();
        if constexpr (SPLIT > 1) {
            const int from = 1 + block.lane / ZB, peer = (block.rank + SPLIT - from) % SPLIT;
            if (block.warp != 0 || from >= SPLIT) return;
            if (block.lane % ZB == 0) barrier_expect(block.arrived(Z_EXCHANGE, from), ZB * OWN * 128);
            const uint32_t at = z + block.lane % ZB * BLOCK64 + block.rank * OWN * 128;
            copy_to_peer(at_rank(at, peer), at, OWN * 128, at_rank(block.arrived(Z_EXCHANGE, from), peer));
        }
    }
};

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
