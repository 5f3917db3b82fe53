"""The ledger of a run: digests of each step's state, chained, and what can be read from them."""
