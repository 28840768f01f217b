// Rows of the tables and their products in `fused.cu`: a block's own rows of z, written to the activations and sent to the
// blocks that score the same rows. Part of fused.cu.
#pragma once

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
