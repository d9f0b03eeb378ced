"""Tasks with made-up texts, for training and evaluation alike."""
