"""How sure a share of few trials is."""

import math

# Standard deviations on either side that hold 95 % of a normal distribution.
Z95 = 1.959964


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The Wilson score interval of a share at 95 % (Wilson 1927); (0, 1) without a trial."""
    if not trials:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    middle = share + z2 / (2 * trials)
    spread = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = ((middle + sign * spread) / (1 + z2 / trials) for sign in (-1, 1))
    # the bounds of none and of all are 0 and 1, which rounding misses
    return low if successes else 0.0, high if successes < trials else 1.0
