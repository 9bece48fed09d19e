"""What `rmsnorm verify` found, and its JSON."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rmsnorm.tools.verify.judge import RowResult


@dataclass(frozen=True)
class VerifyResult:
    """What `rmsnorm verify` found.

    Attributes:
        device: Where the cases ran: "cpu", "cuda" or "cuda:1".
        kernel: What `explain` says of a call on that device.
        quick: Whether the quick sweep ran.
        seconds: How long it took.
        machine: What `machine.describe` returned.
        rows: The rows of the sweep.
        world: The number of ranks.
        only: The texts by which rows were selected.
    """

    device: str
    kernel: str
    quick: bool
    seconds: float
    machine: dict[str, Any]
    rows: tuple[RowResult, ...]
    world: int = 1
    only: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row keeps the contract."""
        return all(row.ok for row in self.rows)

    @property
    def outputs(self) -> int:
        """The number of elements of y that were computed, without the rows that sum up others."""
        return sum(row.tally.outputs for row in self.rows if row.section != "all")

    def to_json(self) -> dict[str, Any]:
        """Return everything that was counted, in types that `json.dumps` takes."""
        return {
            "verb": "verify",
            "ok": self.ok,
            "outputs": self.outputs,
            "device": self.device,
            "world": self.world,
            "kernel": self.kernel,
            "quick": self.quick,
            "only": list(self.only),
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
            "rows": [_row_json(row) for row in self.rows],
        }


def _row_json(row: RowResult) -> dict[str, Any]:
    tally = row.tally
    share = tally.eager_differing / tally.outputs if tally.outputs else None
    counts = {f.name: _finite(getattr(tally, f.name)) for f in dataclasses.fields(tally) if f.name not in ("dx", "dw")}
    gradients = {
        name: {"elements": error.elements, "error": _finite(error.size), "of_eagers": _finite(error.ratio)}
        for name, error in (("dx", tally.dx), ("dw", tally.dw))
    }
    return {
        "section": row.section,
        "name": row.name,
        "ok": row.ok,
        "faults": list(row.faults),
        **counts,
        "eager_share": share,
        **gradients,
    }


def _finite(number: float | None) -> float | None:
    """Return None for infinity and NaN, which JSON does not have; the faults of the row report them."""
    return number if number is not None and math.isfinite(number) else None
