"""Answers as tables in the terminal, and what is under way at the moment."""
