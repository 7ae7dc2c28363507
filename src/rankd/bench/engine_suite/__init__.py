"""`rankd bench engine`: the model alone, beside other engines."""
