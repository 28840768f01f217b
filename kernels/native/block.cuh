// One block of `fused.cu` at work on a layer: where things lie in its shared memory, the warp that streams the weights, the
// product of activations and weights, and how blocks that score the same rows exchange columns. Part of fused.cu.
#pragma once

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

// max(0, x) that keeps a NaN: a broken row must show, not score like another. A pair also becomes FP16, saturated, as
// `pack` does it: one instruction for all of this.
__device__ __forceinline__ uint32_t relu(float low, float high) {
    uint32_t h;
    asm("cvt.rn.relu.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}
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
    for (int i = 0; i < N / 2; ++i) out[i] = relu(acc[2 * i], acc[2 * i + 1]);
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
