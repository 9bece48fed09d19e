"""Adapters to other libraries, one module each. None is imported until you ask for it."""
