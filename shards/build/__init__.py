"""Building shard sets: plan, pack, retry, reshard."""
