"""`rmsnorm verify`: checks the contract on the current device."""
