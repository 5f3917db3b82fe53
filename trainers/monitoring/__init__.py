"""What is said of a run: the log, its views, the report, and what they are made of."""
