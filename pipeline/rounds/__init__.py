"""Prune, retrain, judge, again: the rounds of a run."""
