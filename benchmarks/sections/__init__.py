"""What the documents say about each benchmark, from its results alone."""
