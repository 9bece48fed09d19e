"""Adapters to other libraries, one file a library, which imports it. No other package of ours imports them."""
