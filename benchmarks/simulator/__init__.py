"""The hybrid limiter on a virtual clock: the real workers' and store's code, an invented network. See README.md."""
