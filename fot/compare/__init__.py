"""Other methods that let a model read past its trained length, side by side with a memory; the command ``fot compare``."""
