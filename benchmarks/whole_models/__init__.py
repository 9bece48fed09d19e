"""Measures whole models with different norms, for benchmarks/models.py.

definitions   the models, the modes and the variants
measuring     builds, checks and times the variants of a model in a mode; runs everything that is asked for
batches       the largest batch whose training step fits into a limited memory
gradients     which bits of the gradients recompute changes
result        aims, merging of runs, and what is printed
"""
