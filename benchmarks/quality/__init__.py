"""What pruning does to the quality of a language model, before and after training that recovers it."""
