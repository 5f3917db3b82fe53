"""A trained network made smaller or faster, and what that costs."""
