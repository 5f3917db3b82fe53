"""Any step of a run once more: what it was made of, and whether it gives the same bits."""
