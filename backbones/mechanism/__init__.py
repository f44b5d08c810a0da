"""The variable-depth forward: what `deep_insert` installs, the rows, masks and caches of each layer."""
