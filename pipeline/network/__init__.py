"""The network that is pruned: built, surveyed, counted, followed and made smaller."""
