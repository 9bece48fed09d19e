"""How fast we want to be, relative to the others. Aims are reported as met or not met; nothing fails because of one."""

from dataclasses import dataclass

import torch

from rmsnorm.tools.bench.cases import ADD_FORWARD, BACKWARD, FORWARD, STRIDED_FORWARD, TRAINING, BenchCase, Mode


@dataclass(frozen=True)
class Aim:
    """In a mode, the time of a provider divided by ours must be at least `at_least`."""

    mode: Mode
    provider: str
    at_least: float


@dataclass(frozen=True)
class AimResult:
    """An aim and what was measured."""

    what: str
    measured: float
    at_least: float

    @property
    def met(self) -> bool:
        """Whether the aim is met."""
        return self.measured >= self.at_least


_BIG, _ROW = (8192, 1280), (1, 1280)
_CPU_AIMS = (
    Aim(FORWARD, "copy", 1 / 2),
    Aim(FORWARD, "Definition", 20),
    Aim(FORWARD, "LayerNorm", 1.3),
    Aim(FORWARD, "torch.compile", 1.15),
    Aim(TRAINING, "LayerNorm", 1),
    Aim(TRAINING, "torch.compile", 1),
    Aim(TRAINING, "Definition", 15),
)
_CPU_ROW_AIM = Aim(FORWARD, "F.rms_norm", 3)
_CPU_ROW_SECONDS = 5e-6
_CUDA_WIDEST = 16384
# Rows with gaps are to be as fast as rows without; the two cases are not timed in turn, hence not 1.
STRIDED_SHARE = 0.98


def _cuda_aims(case: BenchCase) -> tuple[Aim, ...]:
    """Return the aims on a GPU: shares of a copy's speed, of QuACK's and of LayerNorm's."""
    wide = case.N > _CUDA_WIDEST
    copy = {FORWARD: 1 / 1.10 if wide else 1 / 1.05, STRIDED_FORWARD: 1 / 1.05, ADD_FORWARD: 1 / 1.05}.get(case.mode)
    if case.mode.gated is not None:
        copy = 1 / 1.20 if case.mode.backward else 1 / 1.10
    if case.mode == BACKWARD:
        copy = 1 / 1.30 if wide or case.N < 1024 else 1 / 1.10
    small = case.M * case.N < 1 << 25
    of_copy = () if copy is None or small or case.N > 262144 else (Aim(case.mode, "copy", copy),)
    return (*of_copy, Aim(FORWARD, "QuACK", 0.98), Aim(case.mode, "LayerNorm", 1))


def aims_of(case: BenchCase, cuda: bool) -> tuple[Aim, ...]:
    """Return the aims for a case.

    Args:
        case: The case.
        cuda: Whether it was measured on a GPU.
    """
    if cuda:
        return tuple(aim for aim in _cuda_aims(case) if aim.mode == case.mode)
    if case.dtype == torch.float16:
        return ()
    aims: tuple[Aim, ...] = {_BIG: _CPU_AIMS, _ROW: (_CPU_ROW_AIM,)}.get((case.M, case.N), ())
    return tuple(aim for aim in aims if aim.mode == case.mode)


def seconds_aimed_at(case: BenchCase, cuda: bool) -> float | None:
    """Return the longest time that we want a case to take; None if there is no such aim."""
    return _CPU_ROW_SECONDS if not cuda and aims_of(case, cuda) == (_CPU_ROW_AIM,) else None
