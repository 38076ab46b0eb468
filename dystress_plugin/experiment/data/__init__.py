"""Data sets: which images there are, which of them stay, and how they become views."""
