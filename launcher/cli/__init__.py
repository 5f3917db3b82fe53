"""The command line, a module for each section of its help."""
