"""Does generated data help a classifier on walking passes that nobody has seen? Trials, intervals, fidelity, report."""
