"""One file a device. Only these import Triton or Numba, and nothing imports these until a tensor asks for them."""

import os

PROCESS = os.getpid()  # a child that is forked from it has none of the threads that torch started in it
