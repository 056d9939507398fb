"""Optional: the routers in front of rewritten blocks become one `samoyeds::router` each."""
