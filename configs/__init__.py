"""The recipe: its strict schema, its loader, and the recipes themselves (YAML). No torch."""
