"""What users do, each a recipe that reads from top to bottom."""
