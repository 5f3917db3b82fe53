"""A trained network, or several as one, as a file that others run."""
