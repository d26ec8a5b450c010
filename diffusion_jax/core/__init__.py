"""The vocabulary and the arithmetic that every other package speaks."""
