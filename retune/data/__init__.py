"""Text and tables on their way to tensors: readers, batches, search."""
