"""Benchmarks of the training step and of the input pipeline."""
