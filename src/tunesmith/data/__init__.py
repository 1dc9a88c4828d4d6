"""A person's data: sources -> rows -> conversations -> examples -> batches, with an account of every row. No torch."""
