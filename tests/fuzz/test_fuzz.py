"""Each decoder of bytes that others send, for a moment; `make fuzz` runs the same for longer."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.attack import attack
from tests.fuzz.targets import TARGETS

quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
each = pytest.mark.parametrize("name", TARGETS)


@each
@quick
@given(data=st.data())
def test_whatever_comes_is_read_or_refused(name: str, data: st.DataObject) -> None:
    """Any other exception ends a turn of somebody's event loop; memory that a sender only names ends a process."""
    attack(TARGETS[name], data.draw(TARGETS[name].hostile))


@each
@quick
@given(data=st.data())
def test_what_is_valid_comes_out_as_it_went_in(name: str, data: st.DataObject) -> None:
    """A decoder that refuses everything would pass every other test."""
    value = data.draw(TARGETS[name].valid)
    assert TARGETS[name].again(value) == value
