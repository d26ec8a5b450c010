"""One file per proof: what is trained, what is measured, and what must hold or fail."""
