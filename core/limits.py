"""What one call may cost, held against an estimate before anything large is allocated."""

import math
from dataclasses import dataclass

from core.engines import Method, choose
from core.errors import TooLarge
from core.shapes import Problem


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in megabytes (10^6 bytes), arithmetic in Gflop (10^9 operations), predicted time in seconds."""

    megabytes: float = math.inf
    gflop: float = math.inf
    seconds: float = math.inf

    def check(self, *problems: Problem, passes: int = 1, method: Method = "auto") -> None:
        """Raise TooLarge where the estimate for `passes` runs of all the problems is above a limit."""
        megabytes = sum(problem.bytes for problem in problems) / 1e6
        if megabytes > self.megabytes:
            raise TooLarge(
                f"this needs about {megabytes:,.0f} MB of memory; at most {self.megabytes:,.0f} MB are allowed",
                quantity="memory",
                got=f"{megabytes:,.0f} MB",
                limit=f"{self.megabytes:,.0f} MB",
            )
        gflop = passes * sum(problem.operations for problem in problems) / 1e9
        if gflop > self.gflop:
            raise TooLarge(
                f"this needs about {gflop:,.0f} Gflop; at most {self.gflop:,.0f} Gflop are allowed",
                quantity="compute",
                got=f"{gflop:,.0f} Gflop",
                limit=f"{self.gflop:,.0f} Gflop",
            )
        if math.isinf(self.seconds):
            return
        seconds = passes * sum(choose(problem, method).seconds for problem in problems)
        if seconds > self.seconds:
            raise TooLarge(
                f"this would take about {seconds:,.3g} s; at most {self.seconds:,.3g} s are allowed",
                quantity="time",
                got=f"{seconds:,.3g} s",
                limit=f"{self.seconds:,.3g} s",
            )
