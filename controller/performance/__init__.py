"""Speed and memory by insert layer, beside the stock model: cases, arms in turns, tables, pictures."""
