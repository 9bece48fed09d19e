"""A model whose norms `patch` replaced, which can run with its own norms or with ours."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmsnorm import memory
from rmsnorm.errors import CommandError
from rmsnorm.patching.patch import patch
from rmsnorm.patching.replacement import set_class
from rmsnorm.tools.models import library
from rmsnorm.tools.report.norms import NormResult
from rmsnorm.tools.report.result import SavedBytes

Side = Literal["before", "after"]  # with the model's own norms, with ours


class PatchedModel:
    """A language model with proven norms.

    Attributes:
        model: The model.
        device: Where it is.
        vocabulary: How many token ids there are.
        positions: The longest sequence; None if the configuration does not limit it.
        verdicts: What `patch` decided about each norm.
        modules: The norms, by name.
        own: Their own classes, by name.
        ours: The classes that `patch` gave them, by name.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        with library.command_errors(f"the configuration of {type(model).__name__} is not that of a language model"):
            text = model.config.get_text_config()
        vocabulary, positions = (getattr(text, key, None) for key in ("vocab_size", "max_position_embeddings"))
        if not isinstance(vocabulary, int) or vocabulary < 1:
            raise CommandError(f"{type(model).__name__} takes no token ids: give the folder of a language model")
        self.vocabulary = vocabulary
        self.positions = positions if isinstance(positions, int) and positions > 0 else None
        self._dy: Tensor | None = None  # the cotangent, kept so that a timed step does not draw it

    def prove(self) -> None:
        """Prove and replace the norms. Raises CommandError if the model does not allow that."""
        own = {name: type(module) for name, module in self.model.named_modules()}
        with library.command_errors(f"the norms of {type(self.model).__name__} cannot be proven"):
            self.verdicts = patch(self.model).verdicts
        modules = dict(self.model.named_modules())
        self.modules: dict[str, nn.Module] = {v.name: modules[v.name] for v in self.verdicts}
        self.own: dict[str, type[nn.Module]] = {name: own[name] for name in self.modules}
        self.ours: dict[str, type[nn.Module]] = {name: type(module) for name, module in self.modules.items()}

    def fresh_results(self) -> tuple[NormResult, ...]:
        """Return a result without measurements for each norm."""
        return tuple(NormResult(v, library.norm_width(self.modules[v.name])) for v in self.verdicts)

    def facts(self) -> dict[str, Any]:
        """Return the model's class, size and dtype, and how many norms and norm parameters it has."""
        norms = self.modules.values()
        return {
            "class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})),
            "norms": len(norms),
            "norm_parameters": sum(p.numel() for module in norms for p in module.parameters(recurse=False)),
        }

    def use(self, side: Side) -> None:
        """Switch to the model's own norms or to ours."""
        for name, module in self.modules.items():
            set_class(module, (self.own if side == "before" else self.ours)[name])

    def forward(self, tokens: int) -> None:
        """Run a forward step, and wait for the GPU."""
        self.model.eval()
        with torch.no_grad():
            self._run(tokens)
            self._wait()

    def train(self, tokens: int) -> None:
        """Run forward and backward of one batch, from a random cotangent, without an optimizer; wait for the GPU."""
        self.model.train()
        y = self._run(tokens)
        if self._dy is None or self._dy.shape != y.shape:
            self._dy = torch.randn(y.shape, dtype=y.dtype, device=y.device)
        torch.autograd.backward(y, self._dy)
        self.model.zero_grad(set_to_none=True)
        self._wait()

    def saved_bytes(self, tokens: int) -> SavedBytes:
        """Count what the model saves for the backward pass, with its own norms and with ours."""
        self.model.train()
        kept = []
        for side in ("before", "after"):
            self.use(side)
            with memory.saved_for_backward(self.model.parameters()) as saved:
                y = self._run(tokens)
                kept.append(saved())
            del y
        return SavedBytes(tokens, *kept)

    def _run(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (1, tokens), generator=generator).to(self.device)
        with library.command_errors(f"{type(self.model).__name__} cannot be run on token ids alone"):
            output = library.run_on_tokens(self.model, ids)
            y: Tensor | None = getattr(output, "last_hidden_state", None)
            first: Tensor = output[0] if y is None else y
        return first

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
