"""Write what leaves the trainer: adapter, merged weights, serving commands, Modelfile."""
