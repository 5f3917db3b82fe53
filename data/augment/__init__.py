"""What happens to pixels on the device: one warp, colour, mixing, normalisation."""
