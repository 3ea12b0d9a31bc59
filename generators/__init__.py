"""Data made here, so that everything runs without a download."""
