"""Tables of names: where each released format keeps the weights of our networks."""
