"""Models that others wrote: reading their files as data, and building them with transformers' own code."""
