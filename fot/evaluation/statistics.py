"""How sure a share is."""

import math

Z = 1.959964  # of a 95 % interval


def wilson(right: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score interval, Journal of the American Statistical Association, 1927).

    Args:
        right: trials that went right.
        trials: all of them.
    """
    if not trials:
        return 0.0, 1.0
    share, spread = right / trials, Z**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
