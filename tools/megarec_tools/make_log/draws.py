"""Named counter-based random numbers of one log."""

import numpy as np
import numpy.typing as npt

from megarec.base.random import derive_key, uniform_numpy

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Draws:
    """Random numbers that are a function of (seed, purpose, counter) alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._keys: dict[str, int] = {}

    def uniform(self, purpose: str, counters: Ints) -> Floats:
        """Uniform in [0, 1), one per counter."""
        if purpose not in self._keys:
            self._keys[purpose] = derive_key(self._seed, "make_log", purpose)
        return uniform_numpy(self._keys[purpose], counters)

    def normal(self, purpose: str, counters: Ints) -> Floats:
        """Standard normal, one per counter (Box and Muller, 1958)."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(f"{purpose}/radius", counters)))
        return radius * np.cos(2.0 * np.pi * self.uniform(f"{purpose}/angle", counters))
