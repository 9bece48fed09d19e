"""The form of docs/verdicts.md: the classes of transformers (verdicts.py), then those of other libraries."""

from pathlib import Path

from rmsnorm import Proof
from rmsnorm.patching.rule import kind_in_words
from rmsnorm.tools import machine

TABLE = Path(__file__).parents[2] / "docs" / "verdicts.md"
OTHERS = "## Other libraries"
MEASURED = "Measured with torch"
N = 96


def measured() -> str:
    """On which machine the figures were measured."""
    facts = machine.describe()
    torch_version = facts["versions"]["torch"].partition("+")[0]
    return f"{MEASURED} {torch_version} on an {facts['cpu']}, {facts['isa']}."


def verdict_of(proof: Proof) -> str:
    """What was proven, or why the norm is left as it is."""
    if proof.spec is None:
        return f"left: {proof.reason}"
    weight = "" if proof.rule is None or proof.rule.weighted else "without a weight, "
    own = f", its own forward {proof.own_forward_when}" if proof.own_forward_when else ""
    return f"{weight}{', '.join(kind_in_words(proof.spec))}{own}"


def line(*cells: str, proof: Proof | None) -> str:
    """A line of a table, with the figures of the proof; None for a norm that could not be built."""
    changes = [] if proof is None else [_change(c.share, c.max_ulp) for c in proof.output_changes.values()]
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join([*escaped, *(changes or ['-'] * 3)])} |"


def without_figures(text: str) -> list[str]:
    """The lines without the share of outputs that change, which depends on how this CPU takes a root and sums."""
    lines = [one for one in text.splitlines() if not one.startswith(MEASURED)]
    return [one.rsplit(" | ", 3)[0] if one.count("|") > 6 else one for one in lines]


def parts() -> tuple[str, str]:
    """The written text: what is about transformers, and what is about other libraries."""
    first, heading, second = TABLE.read_text().partition(f"{OTHERS}\n")
    return first, heading + second


def _change(share: float, ulp: int) -> str:
    return f"{share:.1g}, {ulp} ulp" if ulp else "0"
