"""The time of the history: intervals by a clock that never jumps, stamps by the wall's clock of now.

When somebody sets the wall's clock, nothing is lost and nothing counted twice: all that is kept moves with it. The
clock of intervals runs on while the machine sleeps, so that a sleep is a gap.
"""

from __future__ import annotations

import time


class Clock:
    """Seconds since the machine started, and what they are in Unix time."""

    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return time.time()

    def stamp(self, moment: float) -> float:
        """The Unix time of a moment of `now`."""
        return self.wall() - (self.now() - moment)

    def moment(self, stamp: float) -> float:
        """The moment of a Unix time."""
        return self.now() - (self.wall() - stamp)
