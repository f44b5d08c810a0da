"""The reward table: its cells, its files, and the forwards that compute it."""
