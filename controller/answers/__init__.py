"""What a backbone answers to prompts, each at its own insert layer."""
