"""Data sets as sources of records, and the pipeline that turns records into batches."""
