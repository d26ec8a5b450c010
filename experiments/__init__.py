"""One file per system: each holds the configuration that it trains, samples and is judged with."""
