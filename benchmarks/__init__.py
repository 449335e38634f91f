"""Programs that print the numbers, and draw the pictures, in the README and in docs/."""
