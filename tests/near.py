"""`pytest.approx` for arrays of thousands of numbers: the same rule, by numpy instead of one number
after the other.
"""

import numpy as np


class near:
    """Equal to arrays (or tensors) whose every element is within `rel` of the expected one's size
    or within `abs` of it.
    """

    __array_ufunc__ = None  # so that an array that is compared with it leaves that to it

    def __init__(self, expected, rel: float = 1e-6, abs: float = 1e-12):
        self.expected, self.rel, self.abs = np.asarray(expected), rel, abs
        self.seen = ""

    def __eq__(self, found) -> bool:
        if self.expected.ndim and np.shape(found) != self.expected.shape:
            self.seen = f": its shape is {np.shape(found)}"
            return False
        found, expected = np.broadcast_arrays(np.asarray(found), self.expected)
        with np.errstate(invalid="ignore"):
            difference = np.abs(found - expected)
            allowed = np.maximum(self.rel * np.abs(expected), self.abs)
        wrong = (found != expected) & ~(difference <= allowed)
        if wrong.any():
            place = tuple(int(axis[0]) for axis in np.nonzero(wrong))
            self.seen = (
                f": {wrong.sum()} of {wrong.size} are not, the first at {place} is "
                f"{found[place]} instead of {expected[place]}"
            )
        return not wrong.any()

    def __repr__(self) -> str:
        return f"near({self.expected.shape}, rel={self.rel}, abs={self.abs}){self.seen}"
