"""Silent data corruption: ranks that hold or compute other bits than they should."""
