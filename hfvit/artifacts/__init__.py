"""Files of runs, checkpoints and exports on disk."""
