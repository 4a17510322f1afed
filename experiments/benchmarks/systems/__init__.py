"""fedsim beside a plain PyTorch loop, Flower's simulation and pfl: the same arithmetic, side by side, in one run."""
