"""The limiter's marker, planted as if Redis had served for long: what may be a first start is held back for a while."""

import redis

from lucid.core.rules.leases import MARKER


def plant(client: "redis.Redis", *keys: str) -> None:
    """`keys`: the markers of a cluster's slots; on one server there is one."""
    run = client.info("server")["run_id"]
    pipeline = client.pipeline(transaction=False)
    for key in keys or (MARKER,):
        pipeline.set(key, f"{run} planted 0")
    pipeline.execute()
