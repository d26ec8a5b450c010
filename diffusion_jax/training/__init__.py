"""Training: optimizer, exponential moving average, step, devices and the host loop."""
