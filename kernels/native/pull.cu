// Copy a packed batch from pinned host memory by the multiprocessors: for small batches quicker than the copy engine, whose
// start and end cost more than the transfer.
//
//   to[i] = from[i], i < words      16 bytes each; one thread a word
extern "C" __global__ void __launch_bounds__(256) pull(const uint4* __restrict__ from, uint4* __restrict__ to, int words) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < words) to[i] = from[i];
}
