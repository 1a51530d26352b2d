"""Decoding backends: DALI and torch, the same batches from both."""
