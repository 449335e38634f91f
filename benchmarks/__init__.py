"""Programs that print the numbers in the README and in docs/."""
