"""The limiter's figures: `python -m benchmarks.limiter`; see `benchmarks/README.md`."""
