"""How files are opened, written and locked here: by bounds, atomically, by one writer. The standard library only."""
