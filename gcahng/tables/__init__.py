"""Tables of papers, and one's own, as lists of runs: what is to run, what has run, and how it compares."""
