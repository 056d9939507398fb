"""MoE blocks on a CPU: Samoyeds, dense and sparse, against eager, Inductor and libraries of dense products."""
