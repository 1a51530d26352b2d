"""What `lmcl bench NAME` runs: one module a subject, each with a click command `command`."""
