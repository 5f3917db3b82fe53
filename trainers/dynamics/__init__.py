"""What each sample came to at each visit in training, and what follows from it."""
