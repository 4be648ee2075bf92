"""Show a training while it runs: figures, time left and sampled answers, on the terminal and on a page."""
