"""Shards become batches of crops on the device."""
