"""Warm starts: processes forked from one that has imported what they need."""
