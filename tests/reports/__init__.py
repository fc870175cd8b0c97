"""Reports of faults, rebuilt: a case for each, named by its kind."""
