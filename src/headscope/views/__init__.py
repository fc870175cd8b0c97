"""Answers shown to a person: words, links and data for every view; the terminal; figures."""
