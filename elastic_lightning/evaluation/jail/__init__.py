"""What runs inside the sandbox's own interpreter: the standard library alone, started by `evaluation.sandbox`."""
