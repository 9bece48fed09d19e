"""The docstrings of the public names: each explains every argument and the result, and every example runs."""

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rmsnorm

ROOT = Path(rmsnorm.__file__).parent
WITH_EXAMPLES = [path for path in sorted(ROOT.rglob("*.py")) if ">>>" in path.read_text()]


def module_of(path: Path) -> str:
    return ".".join(("rmsnorm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def sections(text: str) -> dict[str, str]:
    """The sections of a Google docstring by their titles; the text before the first is at ""."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Examples?):\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def explained(section: str) -> list[str]:
    """The names that an Args or Attributes section explains: `name: Text` or `name (type): Text`."""
    return [name.lstrip("*") for name in re.findall(r"^    (\*{0,2}\w+)(?: \(.*\))?: *\S", section, re.MULTILINE)]


def faults(thing: Any) -> list[str]:
    """What the docstring of a public function or class lacks."""
    text = inspect.cleandoc(thing.__doc__ or "")
    summary, _, rest = text.partition("\n")
    found = sections(text)
    signature = inspect.signature(thing)
    parameters = [name for name, parameter in signature.parameters.items() if name != "self"]
    given = explained(found.get("Args", "") + found.get("Attributes", ""))
    faults = []
    if len(summary.split()) < 4 or not summary.endswith(".") or rest.partition("\n")[0].strip():
        faults.append("no summary of one line")
    faults += [f"{name} is not explained" for name in parameters if name not in given]
    faults += [f"there is no {name}" for name in given if name not in parameters]
    returns = not isinstance(thing, type) and signature.return_annotation not in (None, inspect.Signature.empty)
    if returns and "Returns" not in found:
        faults.append("the result is not explained")
    if ">>>" not in found.get("Example", "") + found.get("Examples", ""):
        faults.append("no example")
    return faults


@pytest.mark.parametrize("name", rmsnorm.__all__)
def test_every_public_name_explains_its_arguments_and_its_result_and_has_an_example(name: str) -> None:
    assert faults(getattr(rmsnorm, name)) == []


def test_the_docstring_of_the_package_lists_exactly_the_public_names() -> None:
    listed = re.findall(r"^([\w, ]+): ", rmsnorm.__doc__ or "", re.MULTILINE)
    assert sorted(name for names in listed for name in names.split(", ")) == sorted(rmsnorm.__all__)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_of)
def test_the_examples_in_docstrings_run_and_print_what_they_say(path: Path) -> None:
    torch.manual_seed(0)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    names = {"rmsnorm": rmsnorm, "torch": torch}
    for example in finder.find(importlib.import_module(module_of(path)), extraglobs=names):
        runner.run(example, out=report.append)
    assert runner.tries > 0, "no example was found"
    assert runner.failures == 0, "".join(report)


def test_an_incomplete_docstring_is_noticed() -> None:
    def undocumented(x: int) -> int:
        return x

    def documented(x: int, *, y: int) -> int:
        """Add them.

        Args:
            x: The first.
            z: A name that is no argument.

        Example:
            >>> documented(1, y=2)
            3
        """
        return x + y

    assert faults(undocumented) == [
        "no summary of one line", "x is not explained", "the result is not explained", "no example",
    ]  # fmt: skip
    assert faults(documented) == [
        "no summary of one line", "y is not explained", "there is no z", "the result is not explained",
    ]  # fmt: skip
    assert faults(rmsnorm.cost) == []
