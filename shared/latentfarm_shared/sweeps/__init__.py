"""Which images a sweep stands for, and in which order: arithmetic on axes, without a spec."""
