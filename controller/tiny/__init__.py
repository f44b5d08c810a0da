"""The training of the embedded tiny backbone, from random weights to its model card."""
