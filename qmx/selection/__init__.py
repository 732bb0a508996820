"""Choice of the images to ask about, and propagation of their answers to the others."""
