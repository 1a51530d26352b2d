"""Kept features of a frozen backbone; can be removed without touching the rest."""
