"""What ``tools/gpu_check.py`` checks on a GPU, a step in each process, and how that is reported."""
