"""Skips the files of tests that need a library which is not installed."""

import importlib.util

import pytest


def need(library: str) -> None:
    """Skip the calling file if the library is missing. One that is there but cannot be imported is a failure."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: make test-integrations", allow_module_level=True)
