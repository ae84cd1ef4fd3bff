"""`lucid dev`: the gateway with everything around it, on one machine. The tests use its parts too."""
