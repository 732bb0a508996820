"""Choice of the images to ask about: orders, by features, by answers; and propagation to the
rest."""
