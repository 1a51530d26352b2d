"""What `lmcl bench NAME` runs; one module per subject, each exposing a click command named `command`."""
