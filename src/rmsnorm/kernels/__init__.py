"""One file a device. Only these import Triton or Numba, and nothing imports these until a tensor asks for them."""
