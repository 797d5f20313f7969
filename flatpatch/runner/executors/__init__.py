"""Who carries out a list of runs: this machine, or SLURM."""
