"""Answers shown to a person: words and links, data for JSON, tables in `terminal/`, pictures in `figures/`."""
