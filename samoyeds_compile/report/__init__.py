"""Seeing what the compiler did: reports, their table, the dump folder, `explain`."""
