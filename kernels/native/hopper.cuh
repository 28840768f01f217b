// Instructions of Hopper (sm_90a) that CUDA C++ has no names for: barriers in shared memory that count bytes, bulk copies,
// clusters, and the asynchronous matrix product of a warpgroup.
#pragma once

__device__ __forceinline__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ uint32_t at_rank(uint32_t local, int rank) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
    return remote;
}

__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t bar, int count) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t bar, int phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\nbra again;\nover:\n}" ::"r"(bar), "r"(phase) : "memory");
}

__device__ __forceinline__ void copy_weights(uint32_t to, const uint8_t* from, int bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar) : "memory");
}

__device__ __forceinline__ void copy_to_peer(uint32_t to, uint32_t from, int bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "r"(from), "r"(bytes), "r"(bar) : "memory");
}

// Ordinary writes of this thread become visible to wgmma and to bulk copies.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void sync_warps() { asm volatile("bar.sync 1, 256;" ::: "memory"); }   // all but the ninth

// 128-byte swizzle, rows of 128 bytes, groups of 8 rows 1024 bytes apart. Advances by 1 every 16 bytes. The empty asm
// hides that many layers use equal descriptors: kept, they would take all registers.
__device__ __forceinline__ uint64_t matrix(uint32_t at) {
    uint64_t m = static_cast<uint64_t>((at & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
    asm volatile("" : "+l"(m));
    return m;
}

#define R4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define R8(c, i) R4(c, i), R4(c, i + 4)
#define R32(c, i) R8(c, i), R8(c, i + 8), R8(c, i + 16), R8(c, i + 24)
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "

// c[64, 2 N] += A[64, 16] B[2 N columns, 16]; A and B in shared memory.
__device__ __forceinline__ void wgmma(float (&c)[4], uint64_t a, uint64_t b) {
    asm volatile(WGMMA(8) "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;" : R4(c, 0) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&c)[8], uint64_t a, uint64_t b) {
    asm volatile(WGMMA(16) "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;" : R8(c, 0) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&c)[16], uint64_t a, uint64_t b) {
    asm volatile(WGMMA(32) "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
                 : R8(c, 0), R8(c, 8) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&c)[32], uint64_t a, uint64_t b) {
    asm volatile(WGMMA(64) "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
                 : R32(c, 0) : "l"(a), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b) {
    asm volatile(WGMMA(128) "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
                 : R32(c, 0), R32(c, 32) : "l"(a), "l"(b));
}
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// Accumulators belong to the products between fence and wait; this keeps the compiler from moving their use there.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
