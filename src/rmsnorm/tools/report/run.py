"""Decides what is measured within the budget, and measures it.

Proving comes first and is not limited. Then the norms are checked and timed on as many tokens as a share of the
remaining time allows, and whole-model steps run in pairs in what is left. What does not fit runs on fewer tokens or is
left out, and a note says so.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from rmsnorm.errors import CommandError, one_line
from rmsnorm.functional import wait_for_host
from rmsnorm.kernels.host import loader as host
from rmsnorm.tools import machine, timing
from rmsnorm.tools.display import duration
from rmsnorm.tools.models.loading import Built
from rmsnorm.tools.report.budget import FEWEST_TOKENS, MARGIN, Announcer, Budget, TimeModel, most_tokens, probe
from rmsnorm.tools.report.norm_timer import OUTLIER, NormTimer, examine
from rmsnorm.tools.report.norms import WITH_BACKWARD, Mode, total
from rmsnorm.tools.report.patched import CompiledModel, PatchedModel, Side, Sides
from rmsnorm.tools.report.prediction import CopyLine, measure_copies
from rmsnorm.tools.report.result import Compilation, MemoryBytes, ReportResult
from rmsnorm.tools.report.steps import FEWEST_PAIRS, StepResult

_MOST_PAIRS = 200
_NORM_SECONDS = 8.0  # the most for timing the norms alone, all of them together
_MEMORY_STEPS = 6  # what measuring memory takes, in training steps: each is also run with recompute
_COPY_SECONDS = 1.0  # the most for timing copies
_OF_A_KIND = 3  # how many norms of a kind are timed if only their sum is needed
# Shares of the time that is left.
_FOR_THE_COMPILER, _FOR_EXAMINING, _FOR_NORMS = 0.25, 0.25, 0.2
_GRACE = 0.1  # the share of the budget by which it may be exceeded to get the fewest pairs

Runs = dict[Mode, Callable[[int], None]]


class ReportRun:
    """Measures one model within a budget.

    Args:
        target: What the user named.
        device: Where the model is.
        built: The model.
        tokens: The length of the sequence that the user asked for.
        budget: The budget, running since the command started.
        say: Announces what comes next.
        every_layer: Whether to print a row for each norm.
        compiled: Whether whole-model steps are compiled.
    """

    def __init__(
        self, target: str, device: torch.device, built: Built, tokens: int, budget: Budget, say: Announcer,
        every_layer: bool, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.target, self.device, self.budget, self.say, self.every_layer = target, device, budget, say, every_layer
        self.expected, self.notes = built.expected, list(built.notes)
        self.patched = PatchedModel(built.model, device)
        self.asked = self.tokens = min(tokens, self.patched.steps.positions or tokens)
        self.steps: dict[Mode, StepResult] = {}
        self.saved: MemoryBytes | None = None
        self.peak: MemoryBytes | None = None
        self.compiled = compiled
        self.compilation: Compilation | None = None
        self.copy: CopyLine | None = None
        self.sides = len((CompiledModel if compiled else PatchedModel).sides)

    def result(self) -> ReportResult:
        """Measure, and return what was found."""
        self.say("proving and replacing its norms")
        self.patched.prove()
        self.norms = self.patched.fresh_results()
        if any(v.replaced for v in self.patched.verdicts):
            if not wait_for_host(max(0.0, self.budget.left * _FOR_THE_COMPILER)):
                self.notes.append(f"one token is timed as it is {host.described()}")
            self.budget.finish("proving")
            timed = self._examine_within_budget()
            self.budget.finish("norms")
            if timed:
                self._steps_within_budget()
                self.budget.finish("whole-model steps")
        else:
            self.budget.finish("proving")
        facts = machine.describe(self.device)
        if facts["load"] is not None and facts["load"] >= 2 * facts["cores"]:
            self.notes.append(
                f"the machine was busy: {facts['load']:.1f} processes wanted its {facts['cores']} cores in the last "
                "minute, so times differ from those of an idle machine"
            )
        return ReportResult(
            self.target, facts, self._model_facts(), tuple(self.notes), self.norms, self.steps.get("forward"),
            self.steps.get("training"), self.saved, self.peak, self.budget.seconds, self.budget.phases,
            machine.peak_bytes(), self.every_layer, self.compilation, self.copy,
        )  # fmt: skip

    def _model_facts(self) -> dict[str, object]:
        facts = self.patched.facts()
        counts = facts["norms"], facts["norm_parameters"]
        as_expected = None if self.expected is None else counts == self.expected
        return facts | {"tokens": self.tokens, "tokens_asked": self.asked, "as_expected": as_expected}

    def _examine_within_budget(self) -> bool:
        """Check and time the norms on as many tokens as a share of the time allows.

        Returns:
            Whether there was time to time anything.
        """
        budget, asked = self.budget, self.asked
        fewest = min(asked, FEWEST_TOKENS)

        def check(tokens: int) -> None:
            self.tokens, self.norms = tokens, examine(self.patched, tokens, None)

        self.say("checking the norms on a few tokens")
        cost = probe(check, asked, budget.left * _FOR_EXAMINING)
        tokens = most_tokens(asked, cost.predict, budget.left * _FOR_EXAMINING)
        if tokens is None and cost.predict(fewest) * MARGIN <= budget.left:
            tokens = fewest
        if tokens is not None:
            seconds = min(_NORM_SECONDS, budget.left * _FOR_NORMS)
            timer = NormTimer(self.patched, self.say, seconds, ("forward", "token", "training"))
            self.tokens, self.norms = tokens, examine(self.patched, tokens, timer)
        else:
            parts = " and ".join(f"{part} {duration(seconds, 2)}" for part, seconds in budget.phases.items())
            self.notes.append(
                f"nothing is timed: {parts} took so much of the {duration(budget.seconds)} that a pass over {fewest} "
                "tokens does not fit into the rest; give more --seconds"
            )
        if self.tokens < asked:
            self.notes.append(
                f"the norms are checked on {self.tokens:,} of {asked:,} tokens, since more do not fit into "
                f"{duration(budget.seconds)}"
            )
        outliers = sum(n.outlier for n in self.norms)
        if outliers:
            self.notes.append(
                f"outliers: {outliers} norms took more than {OUTLIER:g} times as long as others of their kind, even "
                "when measured again; their times are not used in sums"
            )
        self.pass_time = cost
        if tokens is not None:
            self.say("timing copies of as many bytes as the norms move")
            self.copy = measure_copies(self.device, self.norms, min(_COPY_SECONDS, budget.left * _FOR_NORMS / 4))
        return tokens is not None

    def _steps_within_budget(self) -> None:
        """Time forward and training steps in pairs, on as many tokens as fit; or note why not."""
        if any(n.wrong for n in self.norms):
            self.notes.append("no whole-model step is timed, since outputs are wrong")
        elif not any(n.compared for n in self.norms):
            self.notes.append("no whole-model step is timed, since no activation reached a proven norm")
        else:
            planned = self._plan_steps()
            if planned is not None:
                self._time_steps(*planned)

    def _time_steps(self, tokens: int, runs: Runs) -> None:
        seconds = min(_NORM_SECONDS, self.budget.left * _FOR_NORMS / 2)
        timer = NormTimer(self.patched, self.say, seconds, WITH_BACKWARD, _OF_A_KIND, with_host=True)
        alone = examine(self.patched, tokens, timer)
        model: Sides = self.patched
        if self.compiled:
            model = compiled = self._compile(tokens, runs)
        if "training" in runs:
            self.say("measuring the memory of a training step")
            self.saved, self.peak = model.saved_bytes(tokens), model.peak_bytes(tokens)
        unfused = {}
        for name, rounds in self._rounds(model, tokens, runs).items():
            norms = total(alone, name)
            assert norms is not None  # the first of each kind is always timed
            self.steps[name] = StepResult(tokens, tuple((r["before"], r["after"]) for r in rounds), norms)
            if "unfused" in model.sides:
                unfused[name] = StepResult(tokens, tuple((r["before"], r["unfused"]) for r in rounds), norms)
        if self.compiled:
            self.compilation = Compilation(tuple(compiled.first_calls), unfused)

    def _compile(self, tokens: int, runs: Runs) -> CompiledModel:
        """Compile the steps, however long that takes, and make `runs` run them."""
        with self.budget.without_limit("compiling"):
            compiled = CompiledModel(self.patched)
            for name in list(runs):
                self.say(f"compiling the {name} step with the model's own norms and with ours")
                with self._or_left_out(name, runs):
                    compiled.compile(name, tokens)
                    runs[name] = compiled.train if name == "training" else compiled.forward
        return compiled

    def _plan_steps(self) -> tuple[int, Runs] | None:
        """Decide which steps run, and on how many tokens, so that the fewest pairs fit into what is left.

        Each step also runs on that many tokens, because the first run allocates memory.

        Returns:
            The number of tokens, and the steps; None if nothing fits.
        """
        runs: Runs = {"forward": self.patched.forward, "training": self.patched.train}
        fewest = min(self.tokens, FEWEST_TOKENS)
        if self.budget.left < 2 * self.pass_time.predict(fewest):
            self._leave_out(runs, ["forward", "training"], 4 * self.pass_time.predict(fewest))
            return None
        self.say("checking how long whole-model steps take")
        self.patched.use("after")
        costs: dict[Mode, TimeModel] = {"forward": probe(self.patched.forward, self.tokens, self._seconds_per_call(2))}
        forward = costs["forward"].predict(fewest)
        if self.budget.left > 4 * forward:
            with self._or_left_out("training", runs):
                self.saved = self.patched.saved_bytes(fewest)
        if "training" in runs and self._seconds_per_call(1) < 3 * forward:
            self._leave_out(runs, ["training"], 4 * forward)
        if "training" in runs:
            with self._or_left_out("training", runs):
                costs["training"] = probe(self.patched.train, self.tokens, self._seconds_per_call(1))

        def predict(tokens: int) -> float:
            return sum(costs[name].predict(tokens) for name in runs)

        while runs:
            tokens = most_tokens(self.tokens, predict, self._seconds_per_call(1))
            if tokens is None:
                self._leave_out(runs, ["training" if "training" in runs else "forward"], predict(fewest))
            elif all(tokens in costs[name].seen for name in runs):
                if tokens < self.tokens:
                    self.notes.append(
                        f"whole-model steps run on {tokens:,} of {self.tokens:,} tokens, so that at least "
                        f"{FEWEST_PAIRS} pairs fit into {duration(self.budget.seconds)}"
                    )
                return tokens, runs
            else:
                self.say(f"running the whole-model steps on {tokens:,} tokens")
                for name, run in list(runs.items()):
                    with self._or_left_out(name, runs) if name == "training" else contextlib.nullcontext():
                        costs[name].time(run, tokens, self._seconds_per_call(1))
        return None

    def _seconds_per_call(self, parts: float) -> float:
        """Return how long a call may take for the fewest pairs to fit into 1 / parts of what is left."""
        return self.budget.left * 0.9 / ((self.sides * FEWEST_PAIRS + _MEMORY_STEPS) * parts)

    def _leave_out(self, runs: Runs, names: list[Mode], seconds: float) -> None:
        """Leave out steps and note it. `seconds`: the least that one call of each of the runs is expected to take."""
        for name in names:
            del runs[name]
        # After proving, examining and timing the norms take their shares of what is left.
        steps = self.sides * (FEWEST_PAIRS + 2) * seconds * MARGIN / (1 - 1.5 * _FOR_EXAMINING - _FOR_NORMS)
        needs = self.budget.phases["loading"] + self.budget.phases["proving"] + steps
        self.notes.append(
            f"no {' or '.join(names)} step is timed: {FEWEST_PAIRS} pairs of it do not fit into "
            f"{duration(self.budget.seconds)}, even on {min(self.tokens, FEWEST_TOKENS)} tokens; --seconds "
            f"{math.ceil(needs)} may suffice"
        )

    @contextlib.contextmanager
    def _or_left_out(self, name: Mode, runs: Runs) -> Iterator[None]:
        """Continue without a step if the model raises an exception in it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # the code of a model can raise anything
            reason = str(error) if isinstance(error, CommandError) else one_line(error)
            self.notes.append(f"no {name} step is timed: {reason}")
            self.patched.model.zero_grad(set_to_none=True)
            del runs[name]

    def _rounds(self, model: Sides, tokens: int, runs: Runs) -> dict[Mode, list[dict[Side, float]]]:
        """Time each step with all sides, directly after each other, until the time is spent.

        Which side comes first alternates, so that a machine that gets slower over time favours neither.
        """
        taken: dict[Mode, list[dict[Side, float]]] = {name: [] for name in runs}
        longest = 0.0
        for i in range(_MOST_PAIRS):
            grace = _GRACE * self.budget.seconds if i < FEWEST_PAIRS else 0.0
            if i and longest > self.budget.left + grace:
                break
            start = timing.now()
            for name, run in runs.items():
                self.say(f"timing the {name} step, pair {i + 1}")
                seconds: dict[Side, float] = {}
                for side in model.sides if i % 2 == 0 else reversed(model.sides):
                    model.use(side)
                    began = timing.now()
                    run(tokens)
                    seconds[side] = timing.now() - began
                taken[name].append(seconds)
            longest = max(timing.now() - start, 0.5 * longest)
        return taken
