"""A run: the trainer, its checkpoints, logs, dashboard and plots."""
