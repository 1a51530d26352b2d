"""Training: set-up, the trainer, checkpoints, the run folder."""
