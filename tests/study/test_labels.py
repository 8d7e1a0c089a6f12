"""Names of lines move apart as little as they can and stay inside the picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdopt.study.labels import spread_apart


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_names_are_a_gap_apart_in_their_order_and_inside(places):
    found = spread_apart(np.array(places), 0.08, 0.0, 1.0)
    order = np.argsort(places, kind="stable")
    assert np.all(np.diff(found[order]) >= 0.08 - 1e-9)
    assert found.min() >= -1e-9 and found.max() <= 1 + 1e-9


def test_a_cluster_moves_about_its_mean_and_leaves_others_alone():
    found = spread_apart(np.array([5.0, 1.0, 5.0, 9.0]), 1.0)
    assert found == pytest.approx([4.5, 1.0, 5.5, 9.0])
    assert spread_apart(np.array([0.0, 0.0]), 1.0, low=0.0) == pytest.approx([0.0, 1.0])


def test_too_many_names_are_refused():
    with pytest.raises(ValueError, match="3 labels"):
        spread_apart(np.zeros(3), 0.6, 0.0, 1.0)
