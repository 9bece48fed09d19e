"""Adapters for other libraries, one file for each, which imports the library. Nothing else in rmsnorm imports them."""
