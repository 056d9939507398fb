"""Surface patterns -> `MoERegion`; one family per file."""
