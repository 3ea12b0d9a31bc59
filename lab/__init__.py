"""Experiments around the three commands: python -m lab.sweep, lab.study, lab.bench, ..."""
