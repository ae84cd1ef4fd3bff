"""The benchmark suite: the gateway and its peers, side by side, in one run on one machine."""
