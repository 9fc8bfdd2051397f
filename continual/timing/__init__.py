"""Where the time of a piece of work goes, by stage and by tensor. What is done with that is decided elsewhere."""
