"""Stretches of a cache never overlap, and what is free can be had."""

from hypothesis import given
from hypothesis import strategies as st

from quantkit.runtime.places import Places


def test_gaps_are_filled_and_closed():
    places = Places(10)
    one, two, three = (places.take(size) for size in (3, 2, 4))
    assert [s.first for s in (one, two, three)] == [0, 3, 5]
    assert places.take(2) is None and places.used == 9
    places.give(two)
    assert places.used == 7 and places.take(3) is None  # 2 and 1 are free
    assert places.close_up() == [(three, 5)] and three.first == 3
    assert places.take(3).first == 7 and places.used == 10
    places.give(one)
    assert places.take(2).first == 0
    assert places.close_up() == [(three, 3), *[(s, 7) for s in places._taken[2:]]]


@given(st.lists(st.integers(-5, 9), max_size=60))
def test_whatever_comes_and_goes(steps):
    """A number above 0 takes so many places, one below lets go of a stretch."""
    places, held = Places(20), {}
    for number, step in enumerate(steps):
        if step > 0:
            found = places.take(step)
            if found is None and places.total - places.used >= step:
                before = dict(held)
                for stretch, first in places.close_up():
                    assert before[stretch] == first > stretch.first
                    held[stretch] = stretch.first
                found = places.take(step)
                assert found is not None
            if found is not None:
                held[found] = found.first
        elif held:
            gone = list(held)[step % len(held)]
            del held[gone]
            places.give(gone)
        taken = [place for s in held for place in range(s.first, s.end)]
        assert len(taken) == len(set(taken)) == places.used, number
        assert all(0 <= place < 20 for place in taken)
        assert {s: s.first for s in held} == held
