"""Layout propagation: on, off and at its worst, in one run; and where its thresholds lie."""
