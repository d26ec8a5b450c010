"""Parity: compares the library with outputs recorded from other implementations."""
