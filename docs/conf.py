"""How Sphinx builds the site: `make docs` writes it into build/site.

The sources are README.md, docs/ and the few other documents that these link to, where they are, so that their links
work on the site as they do in the repository. The navigation is the lists of links in docs/index.md.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import rmsnorm
from rmsnorm import integrations

ROOT = Path(__file__).resolve().parent.parent
INDEX = "docs/index"
UNLISTED = "More"  # the caption above pages that docs/index.md does not list

project = "rmsnorm"
version = release = rmsnorm.__version__

root_doc = INDEX
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/LOG.md", "docs/*.md", "docs/*.rst"]
exclude_patterns = [".*", "build", "dist", "src", "tests"]  # not searched for sources
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

myst_heading_anchors = 6  # the anchors that GitHub gives to headings
default_role = "code"  # what docstrings have between single backticks
smartquotes_action = "De"  # dashes and ellipses; quotes belong to values, as in cast="late"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# The libraries that the adapters import; the site is built without them.
autodoc_mock_imports = ["megatron", "sglang", "torchtitan", "verl", "vllm"]

html_theme = "furo"
html_title = f"rmsnorm {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
templates_path = ["templates"]
html_additional_pages = {"index": "redirect.html"}  # build/site/index.html opens docs/index.html
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


# --- navigation ----------------------------------------------------------------------------------------------------


def navigation(index: str, pages: Sequence[str]) -> dict[str, list[str]]:
    """The entries under each heading of docs/index.md, and under "More" the pages that it does not list.

    Args:
        index: The text of docs/index.md. A page is listed by an item that begins with a link to it.
        pages: The pages of docs/, such as "cost.md".

    Returns:
        By heading the entries of a toctree: "What a norm costs <cost.md>", or "cost.md", which gets the page's title.
    """
    found: dict[str, list[str]] = {}
    listed = set()
    for heading, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", index, re.MULTILINE):
        links = re.findall(r"^- \[(.+?)\]\(([^)#:]+)\)", text, re.MULTILINE)
        listed |= {page for _, page in links}
        if links:
            found[heading] = [f"{title.replace('`', '')} <{page}>" for title, page in links]
    unlisted = [page for page in pages if page not in listed]
    return found | ({UNLISTED: unlisted} if unlisted else {})


def add_navigation(app: Any, docname: str, source: list[str]) -> None:
    """Append the navigation to docs/index.md, as hidden tables of contents."""
    if docname != INDEX:
        return
    pages = sorted(
        path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".rst") and path.stem != "index"
    )
    for caption, entries in navigation(source[0], pages).items():
        listed = "\n".join(entries)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


# --- links ---------------------------------------------------------------------------------------------------------


def unlink_folders(app: Any, doctree: Any) -> None:
    """Replace links to folders, which the repository can show and a site cannot, with their texts."""
    from sphinx.addnodes import pending_xref

    for node in list(doctree.findall(pending_xref)):
        if node["reftype"] == "myst" and (ROOT / app.env.docname).parent.joinpath(node["reftarget"]).is_dir():
            node.replace_self(node.children)


# --- the reference -------------------------------------------------------------------------------------------------


def without_fields(app: Any, what: str, name: str, thing: Any, options: Any, signature: str, result: str) -> Any:
    """Leave out the signatures of dataclasses: users get instances, and the text lists the fields."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(thing) else None


def with_code(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Mark the indented parts of a module's docstring as code, which reStructuredText takes for quotations."""
    if what == "module":
        lines[:] = re.sub(r"(?m)^(?! )(.+)\n\n(?=    )", r"\1\n\n::\n\n", "\n".join(lines)).split("\n")


def adapters() -> Iterator[ModuleType]:
    """The modules of rmsnorm.integrations, without the libraries that they import and the decorators of these."""
    from sphinx.ext.autodoc.mock import mock, undecorate

    with mock(autodoc_mock_imports):
        for found in pkgutil.iter_modules(integrations.__path__, "rmsnorm.integrations."):
            module = importlib.import_module(found.name)
            vars(module).update({name: undecorate(thing) for name, thing in vars(module).items()})
            yield module


def public_names(modules: Iterable[ModuleType]) -> Iterator[str]:
    """The names that the reference must have: those of rmsnorm, and the classes and functions of its adapters."""
    yield from (f"rmsnorm.{name}" for name in rmsnorm.__all__)
    for module in modules:
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__:
                yield f"{module.__name__}.{name}"


def check_reference(app: Any, env: Any) -> None:
    """Warn about each public name that no page documents."""
    from sphinx.util import logging

    for name in public_names(adapters()):
        if name not in env.domaindata["py"]["objects"]:
            logging.getLogger(__name__).warning("%s is public, but no page of docs/ documents it", name)


def setup(app: Any) -> None:
    """Connect the functions above; Sphinx calls it."""
    list(adapters())  # autodoc takes the modules that are imported already
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", unlink_folders)
    app.connect("autodoc-process-docstring", with_code)
    app.connect("autodoc-process-signature", without_fields)
    app.connect("env-check-consistency", check_reference)
