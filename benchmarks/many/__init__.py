"""Measures norms and training steps on several GPUs, for benchmarks/many_gpus.py.

definitions   what is measured: cases of norms, sizes, plans, and the options of a run
plans         spread a model over ranks: FSDP2, sequence parallel, both
norms         bits and times of sharded norms, on one rank
steps         training steps of a model that is spread over ranks, on one rank
shares        which part of a profiled step is spent in norms and in collectives
sampling      times that all ranks agree on
measuring     everything on one rank, and one run for each number of ranks
result        aims, and what is printed
"""
