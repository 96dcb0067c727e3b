"""Running parts of programs while compiling: calibration, gradients, partial evaluation."""
