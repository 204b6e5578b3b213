"""How frontends and discovery services find each other."""
