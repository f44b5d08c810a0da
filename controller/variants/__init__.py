"""Making and judging variants: finetuning at a fixed insert layer, and evaluation beside the baseline."""
