"""The memory of one engine. Pools of its own, so that closing it gives all back and touches nobody else's."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from narsil_stream.kernels.exclusive import ON_DEVICE

_PIECE_BYTES = 4 << 20
"""Of an upload: others' copies pass in between, and a table of gigabytes needs no second one in pinned memory."""


class Memory:
    """Allocates, and fills on a stream of its own: what it returns is ready for all streams.

    Any thread may allocate; uploads come from one thread at a time.
    """

    def __init__(self, allocate: Callable[[int], Any] | None = None) -> None:
        """`allocate`: gives a CuPy MemoryPointer to so many bytes; a pool unless somebody wants otherwise."""
        import cupy

        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pool, self._pinned = cupy.cuda.MemoryPool(), cupy.cuda.PinnedMemoryPool()
        self._allocate = allocate or self._pool.malloc

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        """A CuPy array."""
        array = self._empty(shape, dtype)
        array.data.memset_async(0, array.nbytes, self._stream)
        self._stream.synchronize()
        return array

    def upload(self, host: NDArray[Any]) -> Any:
        """A CuPy array of the same shape and type."""
        array = self._empty(host.shape, host.dtype)
        self.write(array, host)
        return array

    def write(self, to: Any, host: NDArray[Any]) -> None:
        """Copy into a contiguous CuPy array of the same shape, or a wider one [rows, width]: the rest becomes zeros."""
        if to.shape == host.shape:
            rows, width = np.ascontiguousarray(host).reshape(-1, 1), 1
        else:
            rows, width = host, int(to.shape[1])
        step = max(1, _PIECE_BYTES // (width * host.itemsize))
        size = min(step, len(rows)) * width * host.itemsize
        buffer = self.pinned(size)
        staging = np.frombuffer(buffer, host.dtype, size // host.itemsize).reshape(-1, width)
        staging[:, rows.shape[1] :] = 0
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            staging[: len(part), : rows.shape[1]] = part
            at = to.data + start * width * host.itemsize
            at.copy_from_host_async(buffer.ptr, part.shape[0] * width * host.itemsize, self._stream)
            self._stream.synchronize()

    def pinned(self, nbytes: int) -> Any:
        """A buffer on the host, with its address in `ptr`."""
        with ON_DEVICE:
            return self._pinned.malloc(nbytes)

    def release(self) -> None:
        """Give back what nobody refers to any more."""
        with ON_DEVICE:
            self._pool.free_all_blocks()
            self._pinned.free_all_blocks()

    def _empty(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> Any:
        import cupy

        with ON_DEVICE:
            shape = (shape,) if isinstance(shape, int) else shape
            nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            return cupy.ndarray(shape, dtype, self._allocate(nbytes))
