"""The online engine: one forward pass for many stays, each at its own hour."""
