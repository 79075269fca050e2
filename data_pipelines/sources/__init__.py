"""Data sets as sources of records: one small class for each."""
