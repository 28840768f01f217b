"""Matrix products of cuBLASLt, bias and ReLU in their epilogue, the fastest of its algorithms found by timing.

Bound by ctypes: CuPy has no cuBLASLt, and a product with fixed pointers is all that a graph needs.
"""

import ctypes
import functools
import importlib
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int32, c_size_t, c_uint64, c_void_p
from typing import Any

import msgspec

from narsil_stream.kernels.exclusive import ON_DEVICE

WORKSPACE_BYTES = 32 << 20
CANDIDATES = 24
"""Algorithms asked for; each is timed."""

_R_32F = 0
_TYPES = {"fp16": 2, "bf16": 14, "tf32": _R_32F, "fp32": _R_32F}
_COMPUTE = {"fp16": 68, "bf16": 68, "tf32": 77, "fp32": 68}
_TRANS_A, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_PLAIN, _RELU, _BIAS = 1, 2, 4
"""Of an epilogue; with both, RELU | BIAS."""
_MAX_WORKSPACE = 1
_OP_T = 1
_handles: dict[int, c_void_p] = {}
"""By device."""


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasError(Exception):
    """A call that failed, with cuBLAS's status."""


class Product(msgspec.Struct, frozen=True):
    """One layer with fixed addresses: y = x wᵀ, + bias unless it is 0, ReLU if `relu`.

    All row-major; `x`, `w`, `bias`, `y` are device addresses: x [rows, inputs], w [outputs, inputs], bias [outputs],
    y [rows, outputs], a row of it `stride` elements after the other. FP16, BF16, or FP32 for fp32 and tf32. 16-bit
    widths are multiples of 8.
    """

    rows: int
    inputs: int
    outputs: int
    x: int
    w: int
    bias: int
    y: int
    stride: int
    relu: bool

    @property
    def epilogue(self) -> int:
        chosen = (_BIAS if self.bias else 0) | (_RELU if self.relu else 0)
        return chosen or _PLAIN


class Library:
    """Products of one engine, on the process's handle. Not for two threads at a time."""

    def __init__(self) -> None:
        import cupy

        self._lib = _open()
        self._handle = _handle(int(cupy.cuda.runtime.getDevice()))
        self._described: list[tuple[str, c_void_p]] = []
        """What destroys it, and the description of a product, of a matrix."""

    def forget(self) -> None:
        """Destroy the descriptions of all products that were planned: none of them may run again."""
        while self._described:
            destroy, description = self._described.pop()
            self._call(destroy, description)

    def plan(self, product: Product, precision: str, workspace: int, stream: Any) -> Callable[[int], None]:
        """A function that enqueues the product on a stream (its address), by the algorithm that ran fastest.

        `workspace`: device address of WORKSPACE_BYTES. Runs the product, so y is overwritten.
        """
        launch, algorithms = self._prepare(product, precision, workspace)
        best = min(algorithms, key=lambda algo: _time(lambda: launch(algo, stream.ptr), stream))
        return lambda stream_ptr: launch(best, stream_ptr)

    def _prepare(self, p: Product, precision: str, workspace: int) -> tuple[Callable[[Any, int], None], list[Any]]:
        """Row-major y = x wᵀ is column-major yᵀ = w xᵀ: matrix A is w, stored [inputs, outputs] and transposed."""
        kind = _TYPES[precision]
        description = c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(description), c_int(_COMPUTE[precision]), c_int(_R_32F))
        self._described.append(("cublasLtMatmulDescDestroy", description))
        attributes: list[tuple[int, Any]] = [(_TRANS_A, c_int32(_OP_T)), (_EPILOGUE, c_int32(p.epilogue))]
        if p.bias:
            attributes.append((_BIAS_POINTER, c_void_p(p.bias)))
        for key, value in attributes:
            size = c_size_t(ctypes.sizeof(value))
            self._call("cublasLtMatmulDescSetAttribute", description, c_int(key), byref(value), size)
        a = self._matrix(kind, p.inputs, p.outputs, p.inputs)
        b = self._matrix(kind, p.inputs, p.rows, p.inputs)
        c = self._matrix(kind, p.outputs, p.rows, p.stride)
        one, zero = c_float(1), c_float(0)

        def launch(algo: Any, stream: int) -> None:
            status = self._lib.cublasLtMatmul(
                self._handle,
                description,
                byref(one),
                c_void_p(p.w),
                a,
                c_void_p(p.x),
                b,
                byref(zero),
                c_void_p(p.y),
                c,
                c_void_p(p.y),
                c,
                byref(algo),
                c_void_p(workspace),
                c_size_t(WORKSPACE_BYTES),
                c_void_p(stream),
            )
            if status:
                raise CublasError(f"cublasLtMatmul: status {status}")

        return launch, self._algorithms(description, a, b, c)

    def _algorithms(self, description: c_void_p, a: c_void_p, b: c_void_p, c: c_void_p) -> list[Any]:
        preference = c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        limit = c_size_t(WORKSPACE_BYTES)
        size = c_size_t(ctypes.sizeof(limit))
        self._call("cublasLtMatmulPreferenceSetAttribute", preference, c_int(_MAX_WORKSPACE), byref(limit), size)
        found = (_Heuristic * CANDIDATES)()
        count = c_int()
        self._call(
            "cublasLtMatmulAlgoGetHeuristic",
            self._handle,
            description,
            a,
            b,
            c,
            c,
            preference,
            c_int(CANDIDATES),
            found,
            byref(count),
        )
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value:
            raise CublasError("cuBLASLt has no algorithm for a layer. Next: report its widths")
        return [found[i].algo for i in range(count.value)]

    def _matrix(self, kind: int, rows: int, columns: int, stride: int) -> c_void_p:
        """Column-major, as cuBLAS has it."""
        layout = c_void_p()
        size = (c_uint64(rows), c_uint64(columns), ctypes.c_int64(stride))
        self._call("cublasLtMatrixLayoutCreate", byref(layout), c_int(kind), *size)
        self._described.append(("cublasLtMatrixLayoutDestroy", layout))
        return layout

    def _call(self, name: str, *args: object) -> None:
        _call(self._lib, name, *args)


def _time(run: Callable[[], None], stream: Any) -> float:
    """Milliseconds of one launch, the fastest of three trains of eight; infinite for an algorithm that refuses."""
    import cupy

    times = []
    try:
        run()
        for _ in range(3):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            for _ in range(8):
                run()
            stop.record(stream)
            stop.synchronize()
            times.append(float(cupy.cuda.get_elapsed_time(start, stop)))
    except CublasError:
        return float("inf")
    return min(times)


def _call(library: ctypes.CDLL, name: str, *args: object) -> None:
    if status := getattr(library, name)(*args):
        raise CublasError(f"{name}: status {status}")


def _handle(device: int) -> c_void_p:
    """The one of a device (the current one), made once and kept: it may be shared by threads, and to destroy one may
    wait for the whole device."""
    with ON_DEVICE:
        if device not in _handles:
            handle = c_void_p()
            _call(_open(), "cublasLtCreate", byref(handle))
            _handles[device] = handle
        return _handles[device]


@functools.cache
def _open() -> ctypes.CDLL:
    """The library that CuPy's own finder names, else the loader's."""
    try:
        finder: Any = importlib.import_module("cuda.pathfinder")
        return ctypes.CDLL(str(finder.load_nvidia_dynamic_lib("cublasLt").abs_path))
    except Exception:  # no finder, or it found none: the loader may still
        return ctypes.CDLL("libcublasLt.so.13")
