"""Splits: drawing, importing, near duplicates."""
