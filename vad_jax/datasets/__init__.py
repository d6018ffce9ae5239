"""Source files to records, records to batches."""
