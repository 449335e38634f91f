"""What prints the numbers that the README quotes."""
