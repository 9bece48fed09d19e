"""`rmsnorm cost`: what the norms of a model cost, from its configuration alone."""
