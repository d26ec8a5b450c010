"""Metrics: float64 numpy on the host, no network and no device."""
