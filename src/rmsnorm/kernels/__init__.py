"""One file a device. Only cpu.py and gpu.py import Numba or Triton, and nothing imports them until a tensor asks."""

import os

PROCESS = os.getpid()  # a child that is forked from it has none of the threads that torch started in it
