"""Which passages of a memory's documents a question is about: by the model's own attention, by words, or by both."""
