"""What a teacher says of the views that a student learns from."""
