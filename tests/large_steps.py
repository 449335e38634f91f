"""The warning of steps of SGD that are too large for the weights, which tests that train at any rate ignore."""

LARGE_STEPS = "the steps of SGD are about"

ANY_RATE = ("callbacks", "gradients", "strategies", "tasks")
"""Folders of such tests. tests/callbacks/test_step_size_warnings.py is about the warning."""
