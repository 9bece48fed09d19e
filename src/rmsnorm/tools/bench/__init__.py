"""`rmsnorm bench`: measures this norm and others in one run."""
