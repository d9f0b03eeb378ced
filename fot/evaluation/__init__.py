"""What a model with memory can do, measured."""
