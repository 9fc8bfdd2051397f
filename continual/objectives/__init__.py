"""What a model in memory is worth on calibration rows, as a score and as a loss with a gradient."""
