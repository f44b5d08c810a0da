"""Reads users' data files into checked records: instruction JSON, media, and rendered pictures."""
