"""Models: built, measured, and their BatchNorm statistics."""
