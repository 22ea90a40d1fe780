"""The latest entries of a dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.labeling.recent import Recent


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60), st.integers(1, 4))
def test_the_entries_that_were_used_last_are_kept(steps: list[tuple[bool, int]], limit: int) -> None:
    recent: Recent[int, int] = Recent(limit)
    used: list[int] = []  # slow and simple: the keys, the last used one last
    for number, (put, key) in enumerate(steps):
        if put:
            recent.put(key, number)
            assert recent.get(key) == number
        elif (recent.get(key) is not None) != (key in used[-limit:]):
            raise AssertionError(steps)
        if put or key in used[-limit:]:
            used = [*(one for one in used if one != key), key]
        assert len(recent) == min(limit, len(used))
