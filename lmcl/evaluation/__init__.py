"""Evaluation: predictions, metrics, intervals, results of a run."""
