"""Index notation: what one element of a tensor is, as a formula over elements of the tensors it was computed from."""
