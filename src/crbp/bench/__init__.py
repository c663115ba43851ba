"""`crbp bench`: speed, memory and convergence of crbp beside the textbook C-RBP, on this machine."""
