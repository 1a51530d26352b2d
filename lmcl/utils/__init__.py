"""Helpers without knowledge of images or models."""
