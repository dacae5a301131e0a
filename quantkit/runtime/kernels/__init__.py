"""Matrix products with weights that stay packed."""
