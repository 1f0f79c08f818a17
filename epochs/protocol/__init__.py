"""The operations on machines and epochs, one module each, and how each is undone."""
