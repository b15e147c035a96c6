"""Load checkpoints and exports, and predict."""
