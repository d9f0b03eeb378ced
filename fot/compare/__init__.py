"""Other methods that let a model read past its trained length, beside a memory; the command ``fot compare``."""
