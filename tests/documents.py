"""The code in README.md and docs/: found, run, and its printed output put into the documents.

`python tests/documents.py` runs every block of code and rewrites the ```text block that follows it.

A document's ```python blocks run in order and share their names. The words after the language say what is special:

    ```python needs=liger_kernel    skipped where this package cannot be imported
    ```python file=train.py         not run, but written into this file of the current folder
    ```sh run                       run by a shell, in the current folder; other ```sh blocks are not run
    ```text                         what the block before prints, to the letter
    ```text figures-vary            the same, but for figures and "by up to N ulp", which the machine decides
    ```text extract                 not compared: part of an output, or that of another program
"""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a folder of that name without __init__.py, such as tests/kernels, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after it, its text, and where the text is in the document."""

    language: str
    words: tuple[str, ...]
    text: str
    start: int
    line: int

    def _values(self, key: str) -> list[str]:
        return [word.removeprefix(f"{key}=") for word in self.words if word.startswith(f"{key}=")]

    @property
    def missing(self) -> str | None:
        """The package that it needs and that cannot be imported."""
        return next((name for name in self._values("needs") if not _is_installed(name)), None)

    @property
    def file(self) -> str | None:
        """The file that it is written into instead of being run."""
        return next(iter(self._values("file")), None)

    @property
    def is_run(self) -> bool:
        return (self.language == "python" and not self.file) or (self.language == "sh" and "run" in self.words)

    @property
    def is_output(self) -> bool:
        return self.language == "text" and "extract" not in self.words

    def same(self, printed: str) -> bool:
        """Whether a text block is what was printed."""
        return self._comparable(printed) == self._comparable(self.text)

    def _comparable(self, text: str) -> str:
        if "figures-vary" not in self.words:
            return text
        return re.sub(r"\d[\d,.]*(e-\d+)?", "0", re.sub(r" by up to \d+ ulp", "", text))


@dataclass(frozen=True)
class Ran:
    """A block of code, what it printed, and the text block after it, if there is one."""

    block: Block
    printed: str
    output: Block | None


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str) -> list[Block]:
    found = []
    for fence in _FENCE.finditer(text):
        language, *words = fence["info"].split()
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(language, tuple(words), fence["text"], fence.start("text"), line))
    return found


def without_blocks(text: str) -> str:
    return _FENCE.sub("", text)


def run(path: Path) -> Iterator[Ran]:
    """Run the document's code. A block that fails ends it, with its place in the document."""
    found = blocks(path.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        torch.manual_seed(0)
        if path.name in SETUPS:
            names.update(stack.enter_context(SETUPS[path.name]()))
        for number, block in enumerate(found):
            if block.missing:
                continue
            if block.file:
                Path(block.file).write_text(block.text)
            if not block.is_run:
                continue
            if block.language == "sh":
                printed = _run_shell(block, path)
            else:
                code = compile("\n" * block.line + block.text, str(path), "exec")
                with contextlib.redirect_stdout(io.StringIO()) as stdout:
                    exec(code, names)
                printed = stdout.getvalue()
            after = found[number + 1] if number + 1 < len(found) else None
            yield Ran(block, printed, after if after is not None and after.is_output else None)


def _run_shell(block: Block, path: Path) -> str:
    """What the commands print on stdout. They find the programs of this Python's environment first."""
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    ran = subprocess.run(
        ["sh", "-ec", block.text], env={**os.environ, "PATH": programs}, capture_output=True, text=True, timeout=300
    )
    if ran.returncode != 0:
        raise RuntimeError(f"{path}, line {block.line}: exit status {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def rewritten(path: Path) -> str:
    """The document with every output as it was printed just now."""
    text, moved = path.read_text(), 0
    for ran in run(path):
        if ran.output is not None and not ran.output.same(ran.printed):
            start = ran.output.start + moved
            text = text[:start] + ran.printed + text[start + len(ran.output.text) :]
            moved += len(ran.printed) - len(ran.output.text)
    return text


# --- what the documents take for granted -----------------------------------------------------------------------


@contextlib.contextmanager
def _deepseek_v2_lite() -> Iterator[dict[str, Any]]:
    """The model that README loads from the hub has its real norms here, but is on the meta device and has few experts."""
    import transformers

    def from_pretrained(name: str, **options: Any) -> Any:
        assert name == "deepseek-ai/DeepSeek-V2-Lite", name
        config = transformers.DeepseekV2Config(
            vocab_size=128, hidden_size=2048, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=27,
            num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, n_routed_experts=2,
            num_experts_per_tok=1, n_shared_experts=1, first_k_dense_replace=1,
        )  # fmt: skip
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, **options)

    with mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained):
        yield {}


@contextlib.contextmanager
def _no_process_group() -> Iterator[dict[str, Any]]:
    """A document that ends early leaves none to the tests after it."""
    try:
        yield {}
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _empty_folder() -> Iterator[dict[str, Any]]:
    """The current folder of a document that writes files."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield {}


# The names that a document's first block finds, and what is done after its last one, by the document.
SETUPS: dict[str, Callable[[], contextlib.AbstractContextManager[dict[str, Any]]]] = {
    "README.md": _deepseek_v2_lite,
    "sharding.md": _no_process_group,
    "tutorial.md": _empty_folder,
}


def main() -> None:
    for path in documents():
        text = rewritten(path)
        if text != path.read_text():
            path.write_text(text)
            print(f"{path.relative_to(ROOT)} rewritten", file=sys.stderr)


if __name__ == "__main__":
    main()
