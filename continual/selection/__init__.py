"""What a merged model is worth on calibration rows, as a score and as a loss with a gradient."""
