"""Floor 4: sorting, slicing, saving and converting models."""
