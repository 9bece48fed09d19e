"""A budget of wall time, and predictions of how many tokens fit into it."""

import contextlib
from collections.abc import Callable, Iterator

from rmsnorm.tools import timing
from rmsnorm.tools.timing import Progress

FEWEST_TOKENS = 16
MARGIN = 1.25  # how many times as long as predicted a step may take
_FIRST_RUN = 3.0  # a first run that took more than this many times the allowed seconds is not repeated


class Budget:
    """Seconds of wall time from the start of the command, and how many each phase has taken."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = self.last = timing.now()
        self.unlimited = 0.0  # seconds that do not count against the budget
        self.stopped: float | None = None  # when the current phase without a limit began
        self.phases: dict[str, float] = {}

    @property
    def spent(self) -> float:
        """Seconds since the start that count against the budget."""
        now = timing.now() if self.stopped is None else self.stopped
        return now - self.start - self.unlimited

    @property
    def left(self) -> float:
        """Seconds that remain; negative when the budget is exceeded."""
        return self.seconds - self.spent

    @contextlib.contextmanager
    def without_limit(self, phase: str) -> Iterator[None]:
        """Run a phase whose time does not count against the budget."""
        self.stopped = timing.now()
        try:
            yield
        finally:
            seconds, self.stopped = timing.now() - self.stopped, None
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds
            self.unlimited += seconds
            self.last += seconds

    def finish(self, phase: str) -> None:
        """Add the time since the last call, or since the start, to a phase."""
        now = timing.now()
        self.phases[phase], self.last = self.phases.get(phase, 0.0) + now - self.last, now


class TimeModel:
    """Predicts how many seconds a step takes on a number of tokens, from steps that were timed.

    Attributes:
        seen: The seconds of the steps that were timed, by their numbers of tokens.
    """

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def time(self, run: Callable[[int], object], tokens: int, seconds: float) -> None:
        """Run a step and remember its time.

        The first run with a given number of tokens may load kernels and allocate memory, which takes seconds on a GPU.
        So if it takes longer than predicted, the step runs again and the second time counts, unless the first run
        already took far too long.

        Args:
            run: Runs the step on a number of tokens.
            tokens: The number of tokens.
            seconds: How long one run may take.
        """
        expected = self.predict(tokens) if self.seen else 0.0
        taken = _seconds_of(run, tokens)
        if expected * MARGIN < taken <= seconds * _FIRST_RUN:
            taken = _seconds_of(run, tokens)
        self.seen[tokens] = taken

    def predict(self, tokens: int) -> float:
        """Return the seconds on the line through the two largest steps, or in proportion to a single one."""
        if tokens in self.seen:
            return self.seen[tokens]
        *fewer, (many, most) = sorted(self.seen.items())
        if not fewer:
            return most * max(1.0, tokens / many)
        few, least = fewer[-1]
        slope = max(0.0, (most - least) / (many - few))
        return max(least, most + slope * (tokens - many))


def _seconds_of(run: Callable[[int], object], tokens: int) -> float:
    start = timing.now()
    run(tokens)
    return timing.now() - start


def most_tokens(asked: int, predict: Callable[[int], float], seconds: float) -> int | None:
    """Return the largest of asked, asked / 2, asked / 4, … tokens that is expected to fit; None if none fits."""
    tokens = asked
    while predict(tokens) * MARGIN > seconds:
        if tokens <= FEWEST_TOKENS:
            return None
        tokens = max(FEWEST_TOKENS, tokens // 2)
    return tokens


def probe(run: Callable[[int], object], asked: int, seconds: float) -> TimeModel:
    """Time a step on few tokens, then on four times as many while that fits.

    Args:
        run: Runs the step on a number of tokens.
        asked: The number of tokens that the user asked for.
        seconds: What all runs may take together, not counting first runs that are repeated.

    Returns:
        A model of the step's time.
    """
    cost = TimeModel()
    fewest = tokens = min(asked, FEWEST_TOKENS)
    allowed = expected = seconds
    while expected <= seconds and tokens <= max(fewest, asked // 2):
        cost.time(run, tokens, allowed)
        seconds -= cost.seen[tokens]
        tokens *= 4
        # On few tokens, most of the time does not depend on their number.
        expected = 2 * cost.seen[fewest] if len(cost.seen) == 1 else cost.predict(tokens)
    return cost


class Announcer:
    """Reports what comes next, and what percentage of the budget is spent."""

    def __init__(self, progress: Progress, budget: Budget) -> None:
        self.progress, self.budget = progress, budget

    def __call__(self, what: str) -> None:
        self.progress(min(99, int(100 * self.budget.spent / self.budget.seconds)), 100, what)
