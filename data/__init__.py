"""From exchange files to batches: prices, windows, datasets and collators."""
