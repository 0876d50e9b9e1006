"""The report of a run or of several: one self-contained page, and its pictures as files."""
