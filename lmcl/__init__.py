"""Learns to judge the quality of images without a reference (LML-IQA, arXiv 2406.19247)."""
