"""Published models of other programs: reading their weights, and turning them into medm models."""
