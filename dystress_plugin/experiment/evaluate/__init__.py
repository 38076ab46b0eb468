"""Accuracies of a frozen backbone."""
