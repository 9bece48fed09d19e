"""`rmsnorm report`: what replacing the norms of a model changes and gains."""
