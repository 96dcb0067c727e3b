"""What happens on the host around a program: its inputs from arguments, its outputs as results."""
