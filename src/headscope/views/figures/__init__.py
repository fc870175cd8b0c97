"""Figures of heads, of an atlas and of an experiment, as files; they need the package matplotlib."""

from headscope.errors import optional_imports

with optional_imports("figures", "Figures"):
    import matplotlib as matplotlib
