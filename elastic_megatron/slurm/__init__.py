"""Jobs of a chain on a SLURM cluster: scripts, submission, state. Needs no torch, so it works on a login node."""
