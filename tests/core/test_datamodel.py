import numpy as np

from attribution_core.datamodel import predicted_change, removed_rows


def test_what_is_kept_and_what_is_removed_are_complements() -> None:
    keep = np.array([4, 0, 2])
    assert removed_rows(6, keep=keep).tolist() == [1, 3, 5]
    assert removed_rows(6, remove=np.array([5, 1, 3, 3])).tolist() == [1, 3, 5]
    assert removed_rows(3, keep=np.empty(0, np.int64)).tolist() == [0, 1, 2]
    assert removed_rows(3, remove=np.empty(0, np.int64)).tolist() == []


def test_leaving_out_what_helped_lowers_the_measurement() -> None:
    assert predicted_change(np.array([[2.0, -1.0]])).tolist() == [[-2.0, 1.0]]
