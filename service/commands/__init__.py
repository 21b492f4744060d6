"""Commands of `python -m service`, one module each. `add` registers its parser."""
