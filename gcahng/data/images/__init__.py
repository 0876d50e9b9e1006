"""From encoded bytes to the pixels a network sees."""
