"""Valid messages, for tests that need many."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.wire import InferAnswer, InferRequest, Tensor

micros = st.integers(0, 2**53)
texts = st.text(max_size=256)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)  # subnormals and -0.0 too
id_types = st.sampled_from([np.int32, np.int64])


def id_arrays(dtype: type[Any], shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    ends = np.iinfo(dtype)
    return arrays(dtype, shape, elements=st.integers(int(ends.min), int(ends.max)))


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """One-hot or multi-hot, from no rows at all to a few, with ids from their type's whole range."""
    rows, n_dense, n_sparse = draw(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4)))
    dense = codec.tensor("dense", draw(arrays(np.float32, (rows, n_dense), elements=finite)))
    dtype = draw(id_types)
    if draw(st.booleans()):
        return dense, codec.tensor("sparse", draw(id_arrays(dtype, (rows, n_sparse))))
    lengths = draw(arrays(np.int32, (rows, n_sparse), elements=st.integers(0, 3)))
    values = draw(id_arrays(dtype, (int(lengths.sum()),)))
    return dense, codec.tensor("values", values), codec.tensor("lengths", lengths)


requests = st.builds(
    InferRequest,
    id=texts,
    inputs=inputs(),
    budget_us=micros,
    sent_us=micros,
    priority=st.integers(0, 255),
    tenant=st.text(max_size=128),
    traceparent=st.text(max_size=128),
)
scored = st.builds(
    InferAnswer,
    id=texts,
    outputs=arrays(np.float32, st.integers(0, 5), elements=finite).map(lambda a: (codec.tensor("scores", a),)),
    model=texts,
    version=texts,
)
failed = st.builds(
    InferAnswer,
    id=texts,
    fault=st.sampled_from(sorted(Fault.__members__)),
    detail=texts,
    retry_after_us=micros,
)
