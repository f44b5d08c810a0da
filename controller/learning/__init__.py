"""Learning a layer policy from a reward table: algorithms, saved states, the command `train-policy`."""
