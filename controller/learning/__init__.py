"""Learning a layer policy from a reward table: algorithms, saved states, and the command `train-policy`."""
