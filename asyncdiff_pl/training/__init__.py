"""The maths of training: noise and targets, losses, learning rate, what networks are conditioned on; torch alone."""
