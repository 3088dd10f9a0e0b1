"""How sensitive each tensor is, measured."""
