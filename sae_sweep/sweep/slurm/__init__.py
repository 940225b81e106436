"""The same packs as Slurm jobs: what the login node submits and watches, and what a node runs."""
