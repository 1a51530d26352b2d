"""The work behind commands, imported when one is run: their options are read without it."""
