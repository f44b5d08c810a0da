"""The embedded tiny backbone: weights, tokenizer and processor in the published format."""
